"""Benchmarks as they are downloaded, small: every key of the real files, with values of our own."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

QUESTIONS = {  # number of the image, question, ten answers
    "train2014": [
        (9, "What is in the bowl?", ["soup"] * 7 + ["stew"] * 3),
        (9, "How many bowls are there?", ["2"] * 10),
        (581921, "Is it raining?", ["no"] * 9 + ["yes"]),
    ],
    "val2014": [
        (262148, "Where is he looking?", ["down"] * 4 + ["at table"] * 4 + ["skateboard"] * 2),
        (393225, "What sport is this?", ["race"] * 2 + ["surf"] * 6 + ["swim"] * 2),
    ],
}
CAPTIONS = {  # number of the image: the folder, Karpathy's split, captions
    9: ("train2014", "train", ["A bowl of soup.", "Soup in a white bowl. "]),
    42: ("val2014", "restval", ["A shoe rack.", "Shoes on a rack.", "A dog sleeps on shoes."]),
    73: ("val2014", "val", ["Two motorcycles."]),
    391895: ("val2014", "test", ["A man rides a dirt bike.", "A man with a red helmet."]),
}
MEMES = {  # in "train" and "dev_seen": number, label, text
    "train": [(42953, 0, "it is their character"), (8291, 1, "look how many people love you")],
    "dev_seen": [(1796, 1, "everybody loves sunshine"), (35618, 0, "no thank you")],
}


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def touch(folder: Path, names: Iterable[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def question_id(image: int, number: int) -> int:
    return image * 1000 + number


def write_vqa(root: Path, version: str = "v2_") -> Path:
    """VQAv2, or OK-VQA without a version."""
    licence = {"url": "https://example.org", "name": "A licence"}
    info = {"description": "x", "url": "x", "version": "2.0", "year": 2017, "contributor": "x", "date_created": "x"}
    for subset, rows in QUESTIONS.items():
        head = {"info": info, "license": licence, "data_type": "mscoco", "data_subtype": subset}
        questions, annotations = [], []
        for number, (image, question, answers) in enumerate(rows):
            named = {"image_id": image, "question_id": question_id(image, number)}
            questions.append({**named, "question": question})
            given = [
                {"answer_id": i, "answer": answer, "answer_confidence": "yes"} for i, answer in enumerate(answers, 1)
            ]
            if version:
                about: dict[str, Any] = {"question_type": "what", "answer_type": "other"}
                about["multiple_choice_answer"] = answers[-1]  # any, so that it is seen to be taken from here
            else:
                about = {"question_type": "four", "answer_type": "other", "confidence": 3}
                given = [{**answer, "raw_answer": f"{answer['answer']}ing"} for answer in given]
            annotations.append({**named, **about, "answers": given})
        content = {**head, "task_type": "Open-Ended", "questions": questions}
        write_json(root / f"{version}OpenEnded_mscoco_{subset}_questions.json", content)
        annotations.reverse()  # the official files do not promise that the two have the same order
        write_json(root / f"{version}mscoco_{subset}_annotations.json", {**head, "annotations": annotations})
        touch(root / subset, [f"COCO_{subset}_{image:012d}.jpg" for image, _, _ in rows])
    return root


def write_text_vqa(root: Path) -> Path:
    number = 34602
    for split, subset in (("train", "train2014"), ("val", "val2014")):
        data = []
        for image, question, answers in QUESTIONS[subset]:
            entry: dict[str, Any] = {"question": question, "image_id": f"{image:016x}", "image_classes": ["Bowl"]}
            entry |= {"flickr_original_url": "x", "flickr_300k_url": "x", "image_width": 1024, "image_height": 683}
            entry |= {"question_tokens": question.lower().strip("?").split(), "answers": answers}
            data.append({**entry, "question_id": number, "set_name": split})
            number += 1
            touch(root / "train_images", [f"{image:016x}.jpg"])
        head = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        write_json(root / f"TextVQA_0.5.1_{split}.json", {**head, "data": data})
    return root


def write_vizwiz(root: Path) -> Path:
    for split, subset in (("train", "train2014"), ("val", "val2014")):
        entries: list[dict[str, Any]] = []
        for number, (_, question, answers) in enumerate(QUESTIONS[subset]):
            given = [{"answer": answer, "answer_confidence": "maybe"} for answer in answers]
            entry: dict[str, Any] = {
                "image": f"VizWiz_{split}_{number:08d}.jpg",
                "question": question,
                "answers": given,
            }
            entries.append({**entry, "answer_type": "other", "answerable": 1})
        write_json(root / f"{split}.json", entries)
        touch(root / split, [entry["image"] for entry in entries])
    return root


def coco_name(image: int) -> str:
    folder, _, _ = CAPTIONS[image]
    return f"COCO_{folder}_{image:012d}.jpg"


def write_karpathy(root: Path, dataset: str = "coco") -> Path:
    """COCO or Flickr30k, which has neither `restval` nor `filepath` nor `cocoid`."""
    images = []
    for number, (image, (folder, split, captions)) in enumerate(CAPTIONS.items()):
        ids = [number * 10 + i for i in range(len(captions))]
        sentences = [
            {"tokens": caption.lower().strip(" .").split(), "raw": caption, "imgid": number, "sentid": i}
            for i, caption in zip(ids, captions, strict=True)
        ]
        entry = {"sentids": ids, "imgid": number, "sentences": sentences, "split": split}
        if dataset == "coco":
            images.append({**entry, "filepath": folder, "filename": coco_name(image), "cocoid": image})
            touch(root / folder, [coco_name(image)])
        elif split != "restval":
            images.append({**entry, "filename": f"{image}.jpg"})
            touch(root / "flickr30k-images", [f"{image}.jpg"])
    write_json(root / f"dataset_{dataset}.json", {"images": images, "dataset": dataset})
    return root


def write_coco_captions(root: Path) -> Path:
    ours = {image: captions for image, (folder, _, captions) in CAPTIONS.items() if folder == "val2014"}
    more = {"license": 1, "coco_url": "x", "flickr_url": "x", "date_captured": "x", "height": 480, "width": 640}
    # captions of an image are not beside each other
    pairs = [(i, image, caption) for image, captions in ours.items() for i, caption in enumerate(captions)]
    annotations = [{"image_id": image, "id": image * 10 + i, "caption": caption} for i, image, caption in sorted(pairs)]
    images = [{**more, "id": image, "file_name": coco_name(image)} for image in ours]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    write_json(root / "captions_val2014.json", content)
    touch(root / "val2014", map(coco_name, ours))
    return root


def write_hateful_memes(root: Path) -> Path:
    for split, rows in MEMES.items():
        lines = [
            {"id": number, "img": f"img/{number:05d}.png", "label": label, "text": text} for number, label, text in rows
        ]
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        touch(root, [f"img/{number:05d}.png" for number, _, _ in rows])
    return root


def write_image_folder(root: Path, class_names: Mapping[str, str] | None = None) -> Path:
    names = ["n01/b.JPEG", "n01/a.jpg", "n02/a.png"]
    for split in ("train", "val"):
        touch(root / split, [*names, "n01/.a.jpg", "n01/list.txt"])
    if class_names is not None:
        write_json(root / "classes.json", class_names)
    return root
