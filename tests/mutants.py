"""Show that the laws can fail: put one deliberate bug at a time into a copy of the project, and see its test fail.

    make mutants

It takes a few minutes, says which bugs were caught, and writes the list to tests/README.md.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """A bug: `old` becomes `new` in `path`, and `test` must fail. `bug` tells it in words."""

    law: str
    bug: str
    path: str
    old: str
    new: str
    test: str
    unchecked: bool = False


MASK = "flamingo_blocks/blocks/media_mask.py"
ATTENTION = "flamingo_blocks/blocks/attention.py"
WORLD = "examples/tiny_world.py"
BLOCK = "flamingo_blocks/blocks/gated_cross_attention.py"
FEATURES = "flamingo_blocks/blocks/media_features.py"
RESAMPLER = "flamingo_blocks/blocks/perceiver_resampler.py"
CONTRASTIVE = "flamingo_blocks/blocks/contrastive.py"
SCOPES = "flamingo_blocks/scopes.py"
RESIDUAL = "flamingo_blocks/residual_stream.py"
INJECTION = "flamingo_blocks/injection.py"
LANGUAGE = "flamingo_blocks/language.py"
VISION = "flamingo_blocks/vision.py"
BASELINES = "flamingo_blocks/blocks/resampler_baselines.py"
NEW_TOKENS = "flamingo_blocks/new_tokens.py"
MEDIA_CACHE = "flamingo_blocks/media_cache.py"
MEDIA_ENCODING = "flamingo_blocks/media_encoding.py"
CONFIGURATION = "flamingo_blocks/configuration_flamingo.py"
MODELING = "flamingo_blocks/modeling_flamingo.py"
GENERATION = "flamingo_blocks/generation_flamingo.py"
VIDEO = "flamingo_blocks/video.py"
CHAT = "flamingo_blocks/chat.py"
PROCESSING = "flamingo_blocks/processing_flamingo.py"
BUILDER = "flamingo_blocks/builder.py"
ADAPTER = "flamingo_blocks/adapter.py"
PRESETS = "flamingo_blocks/presets.py"

MUTANTS = [
    Mutant(
        "`last`, `all_previous` and `next` are as defined",
        "`next` gives an `<image>` token the medium after its own",
        MASK,
        "torch.where(media_locations, stop - 1, stop)",
        "stop",
        "tests/blocks/test_media_mask.py::test_ranges_follow_their_definition",
    ),
    Mutant(
        "an `<image>` token sees its own medium",
        "a token sees the media strictly before it",
        MASK,
        "return media_locations.cumsum(-1)",
        "return media_locations.cumsum(-1) - media_locations.long()",
        "tests/blocks/test_media_mask.py::test_an_image_token_sees_its_own_medium",
    ),
    Mutant(
        "packed equals unpacked (ranges)",
        "`next` looks into the following document",
        MASK,
        "(start + 1).minimum(last)",
        "(start + 1).minimum(last.amax(1, keepdim=True))",
        "tests/blocks/test_media_mask.py::test_packed_documents_see_what_they_see_alone",
    ),
    Mutant(
        "padding changes nothing (ranges)",
        "`next` lets text after the last medium see one that is not there",
        MASK,
        "ranges.masked_fill((start >= stop)[..., None], 0)",
        "ranges + (start >= stop)[..., None] * ranges.shape[1]",
        "tests/blocks/test_media_mask.py::test_padding_tokens_change_no_range",
    ),
    Mutant(
        "runs cover every token once and are maximal",
        "neighbours that share only a start are one run",
        MASK,
        "(ranges[:, 1:] != ranges[:, :-1]).any(-1)",
        "(ranges[:, 1:] != ranges[:, :-1]).all(-1)",
        "tests/blocks/test_media_mask.py::test_runs_are_maximal_and_cover_every_token_once_in_order",
    ),
    Mutant(
        "`<image>` tokens and media agree in number",
        "fewer `<image>` tokens than media pass",
        MASK,
        "if found != expected:",
        "if found > expected:",
        "tests/blocks/test_media_mask.py::test_every_mismatch_of_image_tokens_and_media_is_found",
    ),
    Mutant(
        "loop over runs = dense = oracle",
        "dense attention repeats the mask medium by medium instead of latent by latent",
        ATTENTION,
        ".repeat_interleave(latents, dim=-1)",
        ".repeat(1, 1, latents)",
        "tests/blocks/test_attention.py::test_every_algorithm_equals_the_loop_oracle_gradients_included",
    ),
    Mutant(
        "loop over runs = dense = oracle",
        "the loop leaves out all media of a range but the first",
        ATTENTION,
        "return media[0] if len(media) == 1 else torch.cat(media, dim=1)",
        "return media[0]",
        "tests/blocks/test_attention.py::test_every_algorithm_equals_the_loop_oracle_gradients_included",
    ),
    Mutant(
        "rows of a batch are independent",
        "the loop takes every row's media from the first row",
        ATTENTION,
        "slice(run.row * num_media + run.media_start, run.row * num_media + run.media_stop)",
        "slice(run.media_start, run.media_stop)",
        "tests/blocks/test_attention.py::test_rows_of_a_batch_are_independent",
    ),
    Mutant(
        "a token depends on no medium outside its range (attention)",
        "the mask lets a token see every medium up to its range's end",
        MASK,
        "(ranges[..., :1] <= index) & (index < ranges[..., 1:])",
        "index < ranges[..., 1:]",
        "tests/blocks/test_attention.py::test_a_token_depends_on_no_medium_outside_its_range",
    ),
    Mutant(
        "an empty range gives exactly zero attention",
        "a token that sees nothing averages all media, as in two public implementations",
        ATTENTION,
        "output.where(sees_something[..., None], 0)",
        "output",
        "tests/blocks/test_attention.py::test_an_empty_range_gives_exactly_zero_and_finite_gradients",
    ),
    Mutant(
        "NaN of a medium reaches those who see it, and no others",
        "dense attention weighs it with zero",
        ATTENTION,
        "media.values.where(is_finite[..., None, None, None], 0)",
        "media.values",
        "tests/blocks/test_attention.py::test_nan_of_a_medium_reaches_the_tokens_that_see_it_and_no_others",
    ),
    Mutant(
        "NaN of a medium reaches those who see it, and no others",
        "dense attention takes it for zero",
        ATTENTION,
        ".where(~sees_nan[..., None], torch.nan)",
        "",
        "tests/blocks/test_attention.py::test_nan_of_a_medium_reaches_the_tokens_that_see_it_and_no_others",
    ),
    Mutant(
        "permuting a medium's latents changes nothing",
        "attention is causal over the latents",
        ATTENTION,
        "attn_mask=mask,",
        "attn_mask=mask, is_causal=mask is None,",
        "tests/blocks/test_attention.py::test_permuting_the_latents_of_a_medium_changes_nothing",
    ),
    Mutant(
        "the order of media matters only through the ranges",
        "values carry the number of their medium",
        ATTENTION,
        "media.values.flatten(0, 1).split(1)",
        "(media.values + torch.arange(num_media)[:, None, None, None]).flatten(0, 1).split(1)",
        "tests/blocks/test_attention.py::test_the_order_of_media_matters_only_through_the_ranges",
    ),
    Mutant(
        "the block is the paper's two lines",
        "the feed-forward gate stands before the feed-forward",
        BLOCK,
        "return hidden_states + self.gate_feed_forward(update).to(hidden_states.dtype)",
        "return hidden_states + self.feed_forward(self.gate_feed_forward(update)).to(hidden_states.dtype)",
        "tests/blocks/test_gated_cross_attention.py::test_block_equals_the_papers_two_lines_gradients_included",
    ),
    Mutant(
        "gate zero is the identity (block)",
        "a sigmoid for a tanh",
        BLOCK,
        "self.alpha.tanh() * x",
        "self.alpha.sigmoid() * x",
        "tests/blocks/test_gated_cross_attention.py::test_gate_zero_is_identity",
    ),
    Mutant(
        "gate zero is the identity (mixed dtypes)",
        "a float32 block turns a bfloat16 residual stream into float32",
        BLOCK,
        "self.gate(self.to_out(attention)).to(hidden_states.dtype)",
        "self.gate(self.to_out(attention))",
        "tests/blocks/test_gated_cross_attention.py::test_gate_zero_is_identity",
    ),
    Mutant(
        "a token depends on no medium outside its range (block)",
        "the mean of all media is added to the queries",
        BLOCK,
        "attend_to_media(self.q_norm(queries), media",
        "attend_to_media(self.q_norm(queries) + media.keys.mean(), media",
        "tests/blocks/test_gated_cross_attention.py::test_a_token_depends_on_no_medium_outside_its_range",
    ),
    Mutant(
        "padding of text and media changes nothing (block)",
        "attention is scaled by the length of the row",
        BLOCK,
        "algorithm=self.algorithm).flatten(2)",
        "algorithm=self.algorithm).flatten(2) / hidden_states.shape[1]",
        "tests/blocks/test_gated_cross_attention.py::test_padding_of_text_and_media_changes_nothing",
    ),
    Mutant(
        "packed equals unpacked (block)",
        "`last` goes back into the document before",
        MASK,
        "start = (stop - 1).maximum(first)",
        "start = (stop - 1).clamp(min=0)",
        "tests/blocks/test_gated_cross_attention.py::test_packed_equals_unpacked",
    ),
    Mutant(
        "each medium is resampled as if it were alone",
        "keys and values leave out the latents",
        RESAMPLER,
        "context = torch.cat([features, latents], dim=1)",
        "context = torch.cat([features, features[:, : latents.shape[1]]], dim=1)",
        "tests/blocks/test_perceiver_resampler.py::test_each_medium_is_resampled_as_if_it_were_alone_and_unpadded",
    ),
    Mutant(
        "padding frames change nothing",
        "temporal embeddings are interpolated to the padded length",
        FEATURES,
        "        if num_frames is None:\n            num_frames = torch.full",
        "        if True:\n            num_frames = torch.full",
        "tests/blocks/test_perceiver_resampler.py::test_each_medium_is_resampled_as_if_it_were_alone_and_unpadded",
    ),
    Mutant(
        "padding frames change nothing, whatever they hold",
        "padding is masked, but not zeroed: NaN times zero is NaN",
        FEATURES,
        "features = features.where(is_real[..., None, None], 0)",
        "pass",
        "tests/blocks/test_perceiver_resampler.py::test_what_padding_frames_hold_changes_nothing",
    ),
    Mutant(
        "the output's shape depends on neither frames nor patches",
        "the features are returned too",
        RESAMPLER,
        "return self.norm(latents).unflatten",
        "return self.norm(torch.cat([latents, features], 1)).unflatten",
        "tests/blocks/test_perceiver_resampler.py::test_the_output_shape_depends_on_neither_frames_nor_patches",
    ),
    Mutant(
        "frame order matters",
        "no temporal embeddings",
        FEATURES,
        "return features + self._embed(frames, num_frames), is_real",
        "return features, is_real",
        "tests/blocks/test_perceiver_resampler.py::test_frame_order_matters_and_patch_order_does_not",
    ),
    Mutant(
        "patch order does not matter",
        "a spatial position",
        FEATURES,
        "return features + self._embed(frames, num_frames), is_real",
        "return features + self._embed(frames, num_frames) + torch.eye(features.shape[3], self.dim), is_real",
        "tests/blocks/test_perceiver_resampler.py::test_frame_order_matters_and_patch_order_does_not",
    ),
    Mutant(
        "interpolated embeddings at max_frames are the learned ones",
        "positions stretch over max_frames intervals, not max_frames - 1",
        FEATURES,
        "torch.where(is_long, index * last, index)",
        "torch.where(is_long, index * self.max_frames, index)",
        "tests/blocks/test_perceiver_resampler.py"
        "::test_temporal_embeddings_are_learned_up_to_max_frames_then_interpolated",
    ),
    Mutant(
        "the contrastive loss has two terms and several positives",
        "positives are not averaged",
        CONTRASTIVE,
        "target = positives / positives.sum(-1, keepdim=True)",
        "target = positives",
        "tests/blocks/test_contrastive.py::test_loss_equals_the_pairwise_loop_with_several_positives",
    ),
    Mutant(
        "gate zero is the base LM, bit for bit",
        "the hook returns hidden states that are rounded",
        INJECTION,
        "hidden_states = block(hidden_states, media, scope.runs)",
        "return block(hidden_states.bfloat16().to(hidden_states.dtype), media, scope.runs)",
        "tests/test_injection.py::test_gate_zero_is_the_base_lm_bit_for_bit",
    ),
    Mutant(
        "gate zero leaves gradients as they are",
        "blocks run without gradient",
        INJECTION,
        "hidden_states = block(hidden_states, media, scope.runs)",
        "return block(hidden_states.detach(), media, scope.runs)",
        "tests/test_injection.py::test_gate_zero_leaves_the_gradients_to_the_inputs_bit_for_bit",
    ),
    Mutant(
        "no token depends on a later medium, through the whole model",
        "`last` sees one medium ahead",
        MASK,
        "        start = (stop - 1).maximum(first)\n",
        "        stop = (stop + 1).minimum(last)\n        start = (stop - 1).maximum(first)\n",
        "tests/test_injection.py::test_no_token_depends_on_a_later_medium",
    ),
    Mutant(
        "inject, then eject, restores the LM",
        "eject forgets to remove the hooks",
        INJECTION,
        "            handle.remove()\n",
        "            pass\n",
        "tests/test_injection.py::test_inject_then_eject_restores_the_lm",
    ),
    Mutant(
        "copies are whole and separate",
        "the hook is a closure",
        INJECTION,
        "register_forward_pre_hook(hook, with_kwargs=True)",
        "register_forward_pre_hook(lambda *a, hook=hook: hook(*a), with_kwargs=True)",
        "tests/test_injection.py::test_copies_are_whole_and_separate",
    ),
    Mutant(
        "scopes nest",
        "an inner scope takes the place of the outer one",
        SCOPES,
        "self._scopes.entries.append(Entry(self._value, is_in_backward()))",
        "self._scopes.entries[:] = [Entry(self._value, is_in_backward())]",
        "tests/test_injection.py::test_scopes_nest_and_exceptions_end_them",
    ),
    Mutant(
        "two threads do not mix",
        "the scope is shared by all threads",
        SCOPES,
        "class Scopes(threading.local):",
        "class Scopes:",
        "tests/test_injection.py::test_two_threads_do_not_see_each_others_media",
    ),
    Mutant(
        "checkpointing gives equal gradients",
        "a recomputed block reads the scope of the moment",
        INJECTION,
        "checkpoint(block, hidden_states, media, scope.runs, use_reentrant=False)",
        "checkpoint(lambda h: block(h, self._scopes.entries[0][0].media, scope.runs), hidden_states, use_reentrant=False)",  # noqa: E501
        "tests/test_injection.py::test_checkpointing_by_transformers_gives_equal_gradients",
    ),
    Mutant(
        "checkpointing around the hooks gives equal gradients with the context",
        "the context carries no scope",
        INJECTION,
        "Opened(self._scopes, self._scopes.current.value)",
        "Opened(self._scopes, None)",
        "tests/test_injection.py::test_checkpointing_around_the_hooks_gives_equal_gradients_with_the_context",
    ),
    Mutant(
        "recomputing without the context is an error, not a wrong gradient",
        "nobody looks whether backward is running",
        INJECTION,
        "if is_in_backward() and not opened_in_backward:",
        "if False:",
        "tests/test_injection.py::test_recomputing_without_the_context_is_an_error_not_a_wrong_gradient",
    ),
    Mutant(
        "no scope is left open",
        "scopes may end in any order",
        SCOPES,
        "self._scopes.entries.pop().value is not self._value",
        "not self._scopes.entries.pop()",
        "tests/test_injection.py::test_a_scope_that_is_held_over_a_yield_is_an_error_and_leaves_nothing_open",
    ),
    Mutant(
        "every n-th layer counts from the first",
        "blocks stand before layers n - 1, 2n - 1, ...",
        INJECTION,
        "range(0, num_layers, every)",
        "range(every - 1, num_layers, every)",
        "tests/test_injection.py::test_the_papers_intervals_give_the_papers_counts",
    ),
    Mutant(
        "the decoder is found beside a vision tower of the same depth",
        "the depth is read from the config of the whole, not of the text decoder",
        LANGUAGE,
        "return config.get_text_config(decoder=True)",
        "return config",
        "tests/test_language.py"
        "::test_the_text_decoder_of_a_vision_language_model_is_found_beside_a_vision_tower_of_the_same_depth",
    ),
    Mutant(
        "gate zero is the identity (several streams)",
        "the mean of the streams is added to each",
        RESIDUAL,
        "streams + (update(mean) - mean)",
        "streams + update(mean)",
        "tests/test_residual_stream.py::test_the_identity_changes_no_bit",
    ),
    Mutant(
        "a block reads the mean of the streams",
        "it reads the first stream",
        RESIDUAL,
        "mean = streams.mean(0)",
        "mean = streams[0]",
        "tests/test_residual_stream.py::test_each_stream_gets_what_the_update_adds_to_their_mean",
    ),
    Mutant(
        "the layout of the residual stream is told, not guessed",
        "one text is enough to tell it",
        RESIDUAL,
        "if len(numbers) == 1 and None not in numbers:",
        "if numbers != {None}:",
        "tests/test_residual_stream.py::test_a_layout_that_fits_one_text_alone_is_not_guessed",
    ),
    Mutant(
        "new tokens stand on an ordinary token",
        "the token that stands in for them may be padding",
        LANGUAGE,
        "if i not in special)",
        "if special)",
        "tests/test_language.py::test_an_ordinary_token_is_none_with_a_meaning",
    ),
    Mutant(
        "new tokens stand on an ordinary token",
        "it is always token 0",
        NEW_TOKENS,
        "input_ids.where(index < 0, self.old_token_id)",
        "input_ids.where(index < 0, 0)",
        "tests/test_new_tokens.py::test_a_language_model_sees_an_ordinary_token_for_a_new_one",
    ),
    Mutant(
        "layers run in their order",
        "any order passes",
        BUILDER,
        "all(place <= before + 1 for before, place in steps)",
        "len(list(steps)) > 0",
        "tests/test_builder.py::test_a_language_model_that_runs_its_layers_in_another_order_is_found_out",
    ),
    Mutant(
        "blocks learn from every loop",
        "loops without gradients pass",
        BUILDER,
        "if len(with_gradients) > 1:",
        "if not with_gradients:",
        "tests/test_builder.py::test_a_language_model_that_learns_from_some_of_its_loops_only_is_refused",
    ),
    Mutant(
        "a cache that gives other logits is not used",
        "it is never tried",
        BUILDER,
        "    choose_decoding(model)\n    image_processor",
        "    image_processor",
        "tests/test_builder.py::test_a_cache_that_gives_other_logits_is_not_used",
    ),
    Mutant(
        "a vision-language model's language model takes new tokens",
        "its configuration is taken for that of the text",
        CONFIGURATION,
        "        text_config = text_config.get_text_config(decoder=True)  #",
        "        #",
        "tests/test_builder.py::test_the_language_model_of_a_vision_language_model_takes_new_tokens",
    ),
    Mutant(
        "checkpointing gives equal gradients for every language model",
        "embeddings are made to require gradients, which those that scale them in place cannot bear",
        MODELING,
        "    def enable_input_require_grads(self) -> None:",
        "    def _unused(self) -> None:",
        "tests/test_coverage.py::test_checkpointing_of_a_language_model_that_scales_its_embeddings_in_place",
    ),
    Mutant(
        "a change in the image is largest in the token at its place",
        "rows and columns of a feature map are swapped",
        VISION,
        "return features.flatten(2).transpose(1, 2)",
        "return features.transpose(2, 3).flatten(2).transpose(1, 2)",
        "tests/test_vision.py::test_a_change_in_the_image_is_largest_in_the_token_at_its_place",
    ),
    Mutant(
        "a change in the image is largest in the token at its place",
        "the class token is taken for a patch, the last patch dropped",
        VISION,
        "return features[:, self.prefix_tokens :]",
        "return features[:, : features.shape[1] - self.prefix_tokens]",
        "tests/test_vision.py::test_a_change_in_the_image_is_largest_in_the_token_at_its_place",
    ),
    Mutant(
        "the backbone is frozen for good",
        "`train()` reaches the backbone, whose statistics move",
        VISION,
        "        if self.is_frozen:\n            self.backbone.eval()\n",
        "",
        "tests/test_vision.py::test_frozen_for_good",
    ),
    Mutant(
        "of several streams of tokens, the last one counts",
        "the first one does",
        VISION,
        "result = result[-1]",
        "result = result[0]",
        "tests/test_vision.py::test_of_several_streams_the_last_one_counts",
    ),
    Mutant(
        "no border of an image is left out",
        "patches that do not fill it pass",
        VISION,
        "if patches_cut_off and input_size[1:] != _native_size(backbone):",
        "if False:",
        "tests/test_vision.py::test_patches_that_leave_out_a_border_are_refused_unless_the_model_was_made_so",
    ),
    Mutant(
        "unfreezing is explicit and whole",
        "the backbone is trained in eval mode",
        VISION,
        "self.backbone.requires_grad_(True).train(self.training)",
        "self.backbone.requires_grad_(True)",
        "tests/test_vision.py::test_unfreezing_lets_gradients_through_and_statistics_move",
    ),
    Mutant(
        "a grid without a map follows from the aspect ratio",
        "height and width are swapped",
        VISION,
        "return (times * height, times * width) if times",
        "return (times * width, times * height) if times",
        "tests/test_vision.py::test_without_an_intermediate_map_the_grid_follows_from_the_images_aspect_ratio",
    ),
    Mutant(
        "any module that says what it returns is an encoder",
        "its class tokens are taken for patches",
        VISION,
        'return TokenLayout("NLC", prefix_tokens, tokens - prefix_tokens, dim, None, "forward")',
        'return TokenLayout("NLC", 0, tokens, dim, None, "forward")',
        "tests/test_vision.py::test_any_module_that_says_what_it_returns_gives_tokens_in_their_place",
    ),
    Mutant(
        "a compiled block serves every layout",
        "the run table is looked at under torch.compile",
        ATTENTION,
        "if not torch.compiler.is_compiling() and runs.media_stop",
        "if runs.table is not None and runs.media_stop",
        "tests/test_compile.py::test_runs_built_beforehand_do_not_recompile_when_media_move",
        unchecked=True,
    ),
    Mutant(
        "inject, then eject restores the language model",
        "layers keep a forward of their own",
        INJECTION,
        "del layer.forward",
        "pass",
        "tests/test_injection.py::test_inject_then_eject_restores_the_lm",
    ),
    Mutant(
        "blocks need torch alone",
        "a block imports transformers",
        BLOCK,
        "from einops import rearrange\n",
        "import transformers\nfrom einops import rearrange\n",
        "tests/test_architecture.py::test_imports_point_only_to_lower_layers",
    ),
    Mutant(
        "gate zero is the base LM (whole model)",
        "the configuration resets the attention implementation of the model in use",
        CONFIGURATION,
        "self.text_config = copy.deepcopy(self.text_config)",
        "pass",
        "tests/test_modeling_flamingo.py::test_gate_zero_is_the_base_lm_bit_for_bit",
    ),
    Mutant(
        "gate zero generates what the base LM generates",
        "an untrained token has the largest logit",
        NEW_TOKENS,
        "self.head.weight.copy_(weight.mean(0, dtype=torch.float32))",
        "self.head.weight.copy_(1e3 * head.weight[13].float())",
        "tests/test_modeling_flamingo.py::test_gate_zero_generates_what_the_base_lm_generates",
    ),
    Mutant(
        "cached decoding = the full forward",
        "generated text sees what the first token of the prompt saw",
        MEDIA_CACHE,
        "positions.clamp(0, last)",
        "positions.clamp(0, last) * (positions <= last)",
        "tests/test_modeling_flamingo.py::test_cached_decoding_equals_the_full_forward",
    ),
    Mutant(
        "media are projected once",
        "keys and values are computed twice",
        GENERATION,
        "media_cache.update(\n            key_values,",
        "key_values = self.injector.project_media(media)\n        media_cache.update(\n            key_values,",
        "tests/test_generation.py::test_media_are_encoded_and_projected_once_however_text_is_generated",
    ),
    Mutant(
        "rows that share media are as rows with copies",
        "tokens of the rows are mixed up",
        INJECTION,
        "hidden_states = hidden_states.reshape(-1, scope.rows_per_media * shape[1], *shape[2:])",
        "hidden_states = hidden_states.transpose(0, 1).reshape(-1, scope.rows_per_media * shape[1], *shape[2:])",
        "tests/test_injection.py::test_rows_that_share_media_give_what_copies_of_the_media_give",
    ),
    Mutant(
        "beams see the media of their row",
        "a beam sees what another token of the row sees",
        MODELING,
        "media_ranges.repeat(1, rows_per_media, 1)",
        "media_ranges.repeat_interleave(rows_per_media, dim=1)",
        "tests/test_generation.py::test_scores_of_what_was_generated_count_new_tokens_too",
    ),
    Mutant(
        "each medium has the latents that it has alone",
        "padding media are encoded",
        MEDIA_ENCODING,
        "if original == i and lengths[i]]",
        "if original == i]",
        "tests/test_media_encoding.py::test_each_medium_has_the_latents_that_it_has_alone_and_the_resampler_the_same_gradients",
    ),
    Mutant(
        "`<image>` tokens and media must agree in number (generate)",
        "nobody counts",
        MEDIA_CACHE,
        "MediaRuns.from_ranges(media_mask.media_ranges(media_locations), num_media=num_media)",
        "pass",
        "tests/test_modeling_flamingo.py::test_counts_of_image_tokens_and_media_that_differ_name_the_row",
    ),
    Mutant(
        "a training step moves what is trained and nothing else",
        "the language model is trained too",
        MODELING,
        'self.language_model.requires_grad_("language_model" not in frozen)',
        "self.language_model.requires_grad_(True)",
        "tests/test_modeling_flamingo.py::test_a_training_step_moves_what_is_trained_and_nothing_else",
    ),
    Mutant(
        "the loss counts what is labelled",
        "labels are not shifted",
        MODELING,
        "loss = self.loss_function(logits=logits, labels=labels,",
        "loss = self.loss_function(logits=logits, labels=labels.roll(1, 1),",
        "tests/test_modeling_flamingo.py::test_the_loss_is_the_mean_over_the_labels",
    ),
    Mutant(
        "save and load keep the frozen set",
        "loading leaves everything trainable, as transformers does",
        MODELING,
        "        model.freeze()\n",
        "",
        "tests/test_modeling_flamingo.py::test_save_and_load_give_the_same_bits_and_the_same_frozen_set",
    ),
    Mutant(
        "save and load give the same bits",
        "buffers that no file holds are left as they come",
        MODELING,
        "        model._restore_buffers()\n",
        "",
        "tests/test_modeling_flamingo.py::test_save_and_load_give_the_same_bits_and_the_same_frozen_set",
    ),
    Mutant(
        "save and load give the same bits",
        "buffers of modules without parameters are left as they come",
        MODELING,
        "return bool(self.language_model.is_custom_code())",
        "return True",
        "tests/test_saving.py::test_language_models_with_ways_of_their_own_round_trip",
    ),
    Mutant(
        "save and load keep the frozen set, also what was frozen by hand",
        "what was frozen by hand is not written down",
        MODELING,
        "self.config.freeze_exceptions = exceptions or None",
        "self.config.freeze_exceptions = None",
        "tests/test_saving.py::test_what_was_frozen_by_hand_is_frozen_again",
    ),
    Mutant(
        "an adapter holds all that was trained",
        "parameters of a frozen backbone that were trained are left out",
        ADAPTER,
        "if not name.startswith(frozen) or tensor.requires_grad",
        "if not name.startswith(frozen)",
        "tests/test_adapter.py::test_single_parameters_of_a_frozen_backbone_may_have_been_trained",
    ),
    Mutant(
        "an adapter knows its backbones again",
        "their numbers do not count",
        ADAPTER,
        "if str(numbers) != str(numbers_found):",
        "if False:",
        "tests/test_adapter.py::test_other_backbones_are_refused_and_left_alone",
    ),
    Mutant(
        "an adapter knows its backbones again",
        "numbers of another dtype may be off by a sixteenth",
        ADAPTER,
        "2**-8",
        "2**-4",
        "tests/test_adapter.py::test_other_backbones_are_refused_and_left_alone",
    ),
    Mutant(
        "an adapter knows its backbones again, in any dtype",
        "numbers of another dtype must be the same",
        ADAPTER,
        "elif dtype == dtype_found:",
        "elif True:",
        "tests/test_adapter.py::test_backbones_may_be_of_another_dtype",
    ),
    Mutant(
        "an adapter remembers revisions",
        "the newest language model is loaded",
        ADAPTER,
        "lm, commit = load_language_model(source, dtype=dtype, revision=revision)",
        "lm, commit = load_language_model(source, dtype=dtype)",
        "tests/test_adapter.py::test_ids_and_revisions_are_remembered",
    ),
    Mutant(
        "an adapter lacks nothing that was trained",
        "what was trained and frozen again is not noticed",
        ADAPTER,
        "if part in (model.config.freeze or ()) and (changed",
        "if False and (changed",
        "tests/test_adapter.py::test_what_was_trained_and_frozen_again_is_not_lost",
    ),
    Mutant(
        "an adapter knows its backbones again",
        "their configuration does not count",
        ADAPTER,
        "return [] if same else",
        "return [] if True else",
        "tests/test_adapter.py::test_the_same_numbers_in_another_model_are_another_backbone",
    ),
    Mutant(
        "an adapter is replaced as a whole or not at all",
        "its files are written one by one",
        ADAPTER,
        "model.config.save_pretrained(unfinished)",
        "model.config.save_pretrained(directory)",
        "tests/test_adapter.py::test_an_adapter_that_cannot_be_written_leaves_the_earlier_one",
    ),
    Mutant(
        "damaged adapters are refused",
        "a missing tensor is not noticed",
        ADAPTER,
        "for name in expected if name not in tensors]",
        "for name in expected if name in ()]",
        "tests/test_adapter.py::test_damaged_files_are_refused_and_leave_the_backbones_alone",
    ),
    Mutant(
        "damaged adapters leave the backbones alone",
        "the blocks stay in the language model",
        MODELING,
        "                model.eject()\n",
        "",
        "tests/test_adapter.py::test_damaged_files_are_refused_and_leave_the_backbones_alone",
    ),
    Mutant(
        "a conversation with caches = the prompt in one piece",
        "earlier media are forgotten",
        MEDIA_CACHE,
        "_first(int(self._num_held.max()), self._num_held.to(media_locations.device))",
        "_first(int(self._num_held.max()), torch.zeros_like(self._num_held))",
        "tests/test_generation.py::test_a_conversation_with_caches_equals_the_prompt_in_one_piece",
    ),
    Mutant(
        "text in pieces sees what it sees in one piece",
        "padding comes before real media",
        MEDIA_CACHE,
        "descending=True",
        "descending=False",
        "tests/test_media_cache.py::test_text_in_pieces_sees_what_it_sees_in_one_piece",
    ),
    Mutant(
        "prefill in chunks gives the same",
        "each chunk counts from 0",
        GENERATION,
        "start = max(start, cached_length(kwargs.get(self._cache_name)) or 0)",
        "pass",
        "tests/test_generation.py::test_a_row_generates_what_it_generates_alone_and_without_padding",
    ),
    Mutant(
        "media follow a cache that is cropped",
        "media of text that is gone are kept",
        MEDIA_CACHE,
        "if start >= end else self._count_before(start)",
        "if True else self._count_before(start)",
        "tests/test_generation.py::test_media_follow_a_cache_that_is_cropped",
    ),
    Mutant(
        "many questions about one image encode it once",
        "copies of the caches copy keys and values",
        MEDIA_CACHE,
        "def __deepcopy__",
        "def no_deepcopy",
        "tests/test_generation.py::test_many_questions_about_one_image_encode_it_once",
    ),
    Mutant(
        "a beam search closes the caches",
        "they stay open, in the order of the beams",
        GENERATION,
        'media_cache.close("a beam search")',
        "pass",
        "tests/test_generation.py::test_a_beam_search_closes_the_caches",
    ),
    Mutant(
        "rows of the caches must be those of the text",
        "nobody compares them",
        MODELING,
        "if text_length and rows not in (None, len(text)):",
        "if False:",
        "tests/test_generation.py::test_rows_of_the_caches_must_be_those_of_the_text",
    ),
    Mutant(
        "drafts change nothing",
        "a language model is given tokens that it does not know",
        GENERATION,
        "input_ids.where(input_ids < known, unknown)",
        "input_ids",
        "tests/test_generation.py::test_drafts_change_nothing",
    ),
    Mutant(
        "sampling with drafts draws from all tokens",
        "a draft gives logits of its own tokens only",
        GENERATION,
        "(0, vocab_size - output.logits.shape[-1])",
        "(0, 0)",
        "tests/test_generation.py::test_sampling_with_drafts_draws_from_all_tokens",
    ),
    Mutant(
        "a Flamingo that drafts sees the media",
        "it sees the text alone",
        GENERATION,
        "media_cache, text, pixel_values, num_frames, media_ranges=media_ranges)",
        "media_cache, torch.zeros(text.shape), None, None)",
        "tests/test_generation.py::test_a_flamingo_that_drafts_sees_the_media_encoded_once_by_itself",
    ),
    Mutant(
        "a language model that drafted is as it was",
        "its own configuration is changed",
        GENERATION,
        "view.config = copy.deepcopy(model.config)",
        "view.config = model.config",
        "tests/test_generation.py::test_a_language_model_that_drafted_is_as_it_was",
    ),
    Mutant(
        "guidance leads away from the text without media",
        "the model is called as if it had media",
        GENERATION,
        "processor.model = partial(self._without_media, nothing)",
        "pass",
        "tests/test_generation.py::test_guidance_leads_away_from_the_text_without_media",
    ),
    Mutant(
        "a cache goes by any name",
        "only the first name is known",
        GENERATION,
        "arguments.pop(name, None) for name in CACHE_NAMES}",
        "arguments.pop(name, None) for name in CACHE_NAMES[:1]}",
        "tests/test_modeling_flamingo.py::test_a_cache_goes_by_any_name",
    ),
    Mutant(
        "two caches are an error",
        "the first one is taken",
        GENERATION,
        "if len(caches) > 1:",
        "if False:",
        "tests/test_modeling_flamingo.py::test_calls_that_would_run_but_not_do_what_was_meant_are_refused",
    ),
    Mutant(
        "no name is used that transformers deprecates",
        "the language model gets its cache by the name of old",
        MODELING,
        "self._cache_name: cache,",
        '"past_key_values": cache,',
        "tests/test_modeling_flamingo.py::test_no_name_is_used_that_transformers_deprecates",
    ),
    Mutant(
        "the output survives the copies that DDP and FSDP make",
        "it holds more than its fields",
        MODELING,
        "return result if (self.config.return_dict",
        'result["more"] = logits\n        return result if (self.config.return_dict',
        "tests/test_modeling_flamingo.py::test_the_output_survives_the_copies_that_ddp_and_fsdp_make",
    ),
    Mutant(
        "the end of a chunk ends the text",
        "it does not",
        MODELING,
        "_with_id(lm.generation_config.eos_token_id, config.end_of_chunk_token_id)",
        "lm.generation_config.eos_token_id",
        "tests/test_generation.py::test_image_tokens_are_not_generated_and_the_end_of_a_chunk_ends_the_text",
    ),
    Mutant(
        "scores count new tokens",
        "the vocabulary is the language model's",
        CONFIGURATION,
        "if not self.new_token_ids:",
        "if True:",
        "tests/test_generation.py::test_scores_of_what_was_generated_count_new_tokens_too",
    ),
    Mutant(
        "old tokens keep their logits",
        "new rows are added to all embeddings",
        NEW_TOKENS,
        "torch.where((index >= 0)[..., None], rows, embeddings)",
        "embeddings + rows",
        "tests/test_new_tokens.py::test_old_tokens_keep_their_logits_bit_for_bit",
    ),
    Mutant(
        "new tokens are what a resized table would hold",
        "ids within the vocabulary keep the old logits",
        NEW_TOKENS,
        "if inside:",
        "if False:",
        "tests/test_new_tokens.py::test_new_tokens_are_what_a_resized_language_model_would_have",
    ),
    Mutant(
        "an untrained token is never the most likely",
        "it starts as another token's row",
        NEW_TOKENS,
        "self.head.weight.copy_(weight.mean(0, dtype=torch.float32))",
        "self.head.weight.copy_(2 * head.weight[13].float())",
        "tests/test_new_tokens.py::test_at_the_start_a_new_token_is_never_the_most_likely",
    ),
    Mutant(
        "each frame stands at its place (processor)",
        "frames are sorted from the end",
        PROCESSING,
        "pixel_values[is_real] = pixels",
        "pixel_values[is_real] = pixels.flip(0)",
        "tests/test_processing_flamingo.py::test_each_frame_stands_at_its_place_and_all_else_is_zero",
    ),
    Mutant(
        "truncation must not cut a medium from its token",
        "nobody looks",
        PROCESSING,
        "            if count != left:",
        "            if False:",
        "tests/test_processing_flamingo.py::test_truncation_must_not_cut_a_medium",
    ),
    Mutant(
        "frames of a video are those shown at equal intervals",
        "they are counted, not timed",
        VIDEO,
        "if told is not None and (shown is None or told > time):",
        "if False:",
        "tests/test_video.py::test_frames_are_those_shown_at_equal_intervals",
    ),
    Mutant(
        "frames of a video are those shown at equal intervals",
        "each is the one after",
        VIDEO,
        "times[0] < time:",
        "times[0] <= time:",
        "tests/test_video.py::test_frames_are_those_shown_at_equal_intervals",
    ),
    Mutant(
        "a number of frames is spread evenly",
        "the last part is left out",
        VIDEO,
        "span.duration / num_frames,",
        "span.duration / (num_frames + 1),",
        "tests/test_video.py::test_a_number_of_frames_is_spread_evenly",
    ),
    Mutant(
        "videos are turned upright",
        "mirrored ones are not",
        VIDEO,
        "    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,\n",
        "",
        "tests/test_video.py::test_videos_are_turned_upright",
    ),
    Mutant(
        "a file that cannot be read to its end is refused",
        "nobody looks at what the container says",
        VIDEO,
        "if declared is not None and end * unit <",
        "if declared is None and end * unit <",
        "tests/test_video.py::test_a_file_that_cannot_be_read_to_its_end_is_refused_by_name",
    ),
    Mutant(
        "a file that cannot be read to its end is refused",
        "nobody looks at what the packets say",
        VIDEO,
        "        if packet.is_corrupt:",
        "        if False:",
        "tests/test_video.py::test_a_file_that_cannot_be_read_to_its_end_is_refused_by_name",
    ),
    Mutant(
        "a video file opens no others",
        "playlists are followed",
        VIDEO,
        'options = {"protocol_whitelist": "none"}',
        "options: dict[str, str] = {}",
        "tests/test_video.py::test_a_file_that_cannot_be_read_to_its_end_is_refused_by_name",
    ),
    Mutant(
        "no frame of a video is held that is not asked for",
        "all are made images",
        VIDEO,
        "        shown = frame\n",
        "        shown = frame\n        _upright(frame)\n",
        "tests/test_video.py::test_no_other_frames_are_made_images",
    ),
    Mutant(
        "the k-th `<image>` of a chat gets the k-th medium",
        "images and videos are collected separately, as transformers does",
        CHAT,
        'return {"type": "image", "image": medium}',
        'return {"type": kind, kind: medium}',
        "tests/test_chat.py::test_the_kth_image_token_gets_the_kth_medium",
    ),
    Mutant(
        "a template that knows text only sees media as text",
        "it sees a list",
        CHAT,
        "        return image_token in tokenizer.apply",
        "        return True or image_token in tokenizer.apply",
        "tests/test_chat.py::test_a_template_that_knows_text_only_sees_media_as_text",
    ),
    Mutant(
        "a growing chat starts with what was there before",
        "an answer does not end as it was generated",
        CHAT,
        "text_of(message['content']) ~ END_OF_CHUNK",
        "text_of(message['content'])",
        "tests/test_chat.py::test_a_growing_dialogue_starts_with_what_was_there_before",
    ),
    Mutant(
        "the suffix tells a video from an image",
        "all paths are images",
        PROCESSING,
        "all_paths or has_video_suffix(media)",
        "all_paths",
        "tests/test_processing_flamingo.py::test_images_and_files_of_both_kinds_stand_in_the_order_of_their_tokens",
    ),
    Mutant(
        "given frames are taken evenly",
        "the first are taken",
        PROCESSING,
        "medium[i * len(medium) // count]",
        "medium[i]",
        "tests/test_processing_flamingo.py::test_frames_that_are_given_are_all_taken_unless_a_number_is_asked_for",
    ),
    Mutant(
        "a misspelt option is an error",
        "it is ignored",
        PROCESSING,
        "        if name not in known:",
        "        if False:",
        "tests/test_processing_flamingo.py::test_an_option_that_is_unknown_or_given_twice_is_refused",
    ),
    Mutant(
        "a damaged file is named by row, medium and frame",
        "it is named by its number in the batch",
        PROCESSING,
        'yield name if is_image else f"{name}, frame {num_frames[row, i]}", frame',
        'yield f"image {int(num_frames.sum())}", frame',
        "tests/test_processing_flamingo.py::test_a_damaged_file_is_refused_by_row_medium_and_frame",
    ),
    Mutant(
        "answers whose tokens are not marked are an error",
        "nobody looks",
        PROCESSING,
        '            _check_masks(result["assistant_masks"], conversations)\n',
        "            pass\n",
        "tests/test_chat.py::test_answers_that_no_template_marks_are_an_error",
    ),
    Mutant(
        "a pipeline gives what processor and model give by hand",
        "a single dialogue loses its media",
        PROCESSING,
        "collect_media(conversation if is_batch else [conversation], load=tokenize)",
        "collect_media(conversation if is_batch else [conversation], load=is_batch)",
        "tests/test_pipeline.py::test_a_dialogue",
    ),
    Mutant(
        "a user's tokenizer is left alone",
        "it gets the new tokens",
        BUILDER,
        "tokenizer = copy.deepcopy(tokenizer)",
        "pass",
        "tests/test_builder.py::test_the_tokenizer_is_copied_and_gets_what_it_lacks",
    ),
    Mutant(
        "a language model that is not what it seems is found out",
        "nobody runs it",
        BUILDER,
        "        check_injection(model)\n",
        "        pass\n",
        "tests/test_builder.py::test_a_time_major_language_model_is_found_out",
    ),
    Mutant(
        "the presets have the paper's shapes",
        "80B has a block before every 8th layer",
        PRESETS,
        "heads=64, every=7",
        "heads=64, every=8",
        "tests/test_presets.py::test_shapes_are_the_papers",
    ),
    Mutant(
        "padding changes nothing (baselines)",
        "padding frames are attended to",
        BASELINES,
        "ignore = ~is_real & is_real.any(-1, keepdim=True)",
        "ignore = torch.zeros_like(is_real)",
        "tests/blocks/test_resampler_baselines.py::test_each_medium_is_resampled_as_if_it_were_alone_and_unpadded",
    ),
    Mutant(
        "a padding medium is finite (baselines)",
        "its mean divides by zero",
        BASELINES,
        ".clamp(min=1)",
        "",
        "tests/blocks/test_resampler_baselines.py::test_each_medium_is_resampled_as_if_it_were_alone_and_unpadded",
    ),
    Mutant(
        "an episode shows only the digits that it may",
        "a digit's place in the list is taken for the digit",
        WORLD,
        "coarse = (of_digit[torch.ones(rows, len(digits)).multinomial(5)],",
        "coarse = (torch.ones(rows, len(digits)).multinomial(5),",
        "tests/test_tiny_world.py::test_episodes_show_what_they_may_and_name_kinds_consistently",
    ),
    Mutant(
        "the third stage sees no withheld digit",
        "captions are of all digits",
        "examples/train_tiny.py",
        "images = torch.isin(train.digits, torch.tensor(digits)).nonzero().squeeze(-1)",
        "images = torch.arange(len(train.digits))",
        "tests/test_train_tiny.py::test_the_third_stage_sees_no_withheld_digit",
    ),
    Mutant(
        "images of a class are drawn without repetition",
        "each is drawn for itself",
        WORLD,
        "order[rows, which, nth]",
        "order[rows, which, nth * 0]",
        "tests/test_tiny_world.py::test_images_of_a_class_are_drawn_without_repetition",
    ),
    Mutant(
        "shuffled prompts tell nothing",
        "they are not shuffled",
        WORLD,
        "if shuffle else support",
        "if not shuffle else support",
        "tests/test_tiny_world.py::test_shuffled_prompts_tell_nothing",
    ),
    Mutant(
        "prompts use names that stage 3 never used",
        "they use all names",
        WORLD,
        "names = ids_of(UNSEEN_NAMES)[torch.ones(count, len(UNSEEN_NAMES)).multinomial(2)]",
        "names = ids_of(NAMES)[torch.ones(count, len(NAMES)).multinomial(2)]",
        "tests/test_tiny_world.py::test_prompts_ask_for_what_they_told",
    ),
    Mutant(
        "a name that can be known stood before",
        "it may stand later",
        WORLD,
        ".tril(-1).any(-1)",
        ".tril(0).any(-1)",
        "tests/test_tiny_world.py::test_entries_name_a_noun_always_the_same_in_a_text_and_endings_agree",
    ),
    Mutant(
        "shapes are checked at run time in tests",
        "the jaxtyping hook is off",
        "pyproject.toml",
        "--jaxtyping-packages=flamingo_blocks,beartype.beartype ",
        "",
        "tests/blocks/test_gated_cross_attention.py::test_shapes_are_checked_at_run_time_in_tests",
    ),
    Mutant(
        "tiles = dense = oracle",
        "a tile gives its last token what the first one sees",
        ATTENTION,
        "first_tile[own] * _TILE + within]",
        "first_tile[own] * _TILE + within % (_TILE - 1)]",
        "tests/blocks/test_attention.py::test_so_it_does_for_many_media_and_for_long_runs",
    ),
    Mutant(
        "varlen = dense = oracle",
        "segments of tokens stand in the wrong order",
        ATTENTION,
        "F.pad(segments.length.flatten().cumsum(0), (1, 0)).int()",
        "F.pad(segments.length.flip(1).flatten().cumsum(0), (1, 0)).int()",
        "tests/blocks/test_attention.py::test_every_algorithm_equals_the_loop_oracle_gradients_included",
    ),
    Mutant(
        "an empty range gives zero, in static shapes too",
        "tokens keep what they got from a medium that they do not see",
        MASK,
        "x = x.masked_fill(~self.sees_something[..., None, None], 0)",
        "pass",
        "tests/blocks/test_attention.py::test_an_empty_range_gives_exactly_zero_and_finite_gradients",
    ),
    Mutant(
        "a broken promise of order gives NaN",
        "it gives what some other medium would",
        MASK,
        "return x.masked_fill(self.is_wrong[..., None, None], torch.nan)",
        "return x",
        "tests/blocks/test_attention.py::test_tokens_whose_ranges_are_not_in_order_come_out_as_nan_where_nobody_could_look",
    ),
    Mutant(
        "dense attention leaves out the mask where all see all",
        "it does where all see the first medium",
        MASK,
        "run.media_start == 0 and run.media_stop == num_media",
        "run.media_start == 0",
        "tests/blocks/test_attention.py::test_so_it_does_where_all_tokens_see_all_media_of_their_row_or_all_but_padding",
    ),
    Mutant(
        "runs that go back are not in order",
        "they are",
        MASK,
        "run.media_stop - run.media_start > 1 or run.media_start < newest",
        "run.media_stop - run.media_start > 1",
        "tests/blocks/test_attention.py::test_the_choice_elsewhere_needs_no_table",
    ),
    Mutant(
        "an algorithm can be forced in a block",
        "the name is ignored",
        BLOCK,
        "media, runs, algorithm=self.algorithm)",
        "media, runs)",
        "tests/blocks/test_gated_cross_attention.py::test_an_algorithm_can_be_forced_by_its_name_at_any_time",
    ),
    Mutant(
        "text in pieces sees the newest medium",
        "the oldest one is held instead",
        MEDIA_CACHE,
        "newest = self._num_held.clamp(min=1)[:, None] - 1",
        "newest = torch.zeros_like(self._num_held)[:, None]",
        "tests/test_media_cache.py::test_text_in_pieces_sees_what_it_sees_in_one_piece",
    ),
    Mutant(
        "what would see dropped media is refused",
        "it sees nothing",
        MEDIA_CACHE,
        "if start and ((left == 0) & (self._num_held < self.num_media)).any():",
        "if False:",
        "tests/test_media_cache.py::test_text_that_would_see_dropped_media_is_refused_and_the_cache_is_as_it_was",
    ),
    Mutant(
        "ranges count all media, those that were dropped too",
        "they count those that are held",
        MEDIA_CACHE,
        "return ranges if self._num_dropped is None else _without(ranges, self._num_dropped)",
        "return ranges",
        "tests/test_media_cache.py::test_text_in_pieces_sees_what_it_sees_in_one_piece",
    ),
    Mutant(
        "media that cannot be seen any more are dropped after generating",
        "they are kept",
        GENERATION,
        "        media_cache.drop_unseen()\n",
        "",
        "tests/test_generation.py::test_many_questions_about_one_image_encode_it_once",
    ),
    Mutant(
        "media of equal sums are told apart",
        "they are taken for copies",
        MEDIA_ENCODING,
        "if torch.equal(media[i, :length], media[j, :length])",
        "if length",
        "tests/test_media_encoding.py::test_media_of_equal_sums_that_are_not_equal_are_told_apart",
    ),
    Mutant(
        "copies are encoded where gradients are asked for",
        "the first one gets all gradient",
        MODELING,
        "find_copies=not media.requires_grad and ",
        "find_copies=",
        "tests/test_media_encoding.py::test_copies_are_encoded_where_their_gradients_may_differ",
    ),
    Mutant(
        "torch.compile tells language models with blocks from those without",
        "it does not look at hooks",
        INJECTION,
        "layer.forward = layer.forward",
        "pass",
        "tests/test_compile.py::test_compiled_code_of_one_lm_is_not_run_for_another_with_other_blocks",
        unchecked=True,
    ),
    Mutant(
        "NaN reaches the gradients of those that see it",
        "a token that sees nothing gets it from a neighbour's medium",
        ATTENTION,
        "segments.clear(queries).flatten(0, 1)[token]",
        "queries.flatten(0, 1)[token]",
        "tests/blocks/test_attention.py::test_nan_reaches_the_gradients_of_those_that_see_it_and_no_others",
    ),
    Mutant(
        "NaN reaches the gradients of those that see it, in tiles left over, too",
        "they take the last medium",
        ATTENTION,
        ".minimum(own[-1, -1])",
        ".clamp(max=batch * num_media - 1)",
        "tests/blocks/test_attention.py::test_nan_reaches_the_gradients_of_those_that_see_it_and_no_others",
    ),
    Mutant(
        "autocast does not undo float32",
        "it does",
        ATTENTION,
        'torch.autocast("cpu", enabled=False)',
        'torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu"))',
        "tests/blocks/test_attention.py::test_autocast_does_not_undo_what_is_computed_in_float32",
    ),
    Mutant(
        "segments belong to their ranges",
        "they are kept by a copy with other ranges",
        MASK,
        'vars(self).setdefault("_segments", {})',
        'vars(type(self))["__annotations__"].setdefault("_segments", {})',
        "tests/blocks/test_attention.py::test_segments_serve_in_training_after_inference_and_belong_to_their_ranges",
    ),
    Mutant(
        "each medium has the latents that it has alone, beside longer ones",
        "all are as long as the longest",
        MEDIA_ENCODING,
        "if len({len(piece) for piece in pieces}) > 1:",
        "if False:",
        "tests/test_media_encoding.py::test_each_medium_has_the_latents_that_it_has_alone_and_the_resampler_the_same_gradients",
    ),
    Mutant(
        "a mask is kept exactly where no ranges say the same",
        "it becomes the range from the first to the last medium, whatever is between",
        MASK,
        "ranges[..., 1] - ranges[..., 0] == mask.sum(-1)",
        "ranges[..., 1] - ranges[..., 0] >= mask.sum(-1)",
        "tests/blocks/test_media_mask.py::test_a_mask_is_kept_exactly_where_a_token_sees_media_that_are_not_neighbours",
    ),
    Mutant(
        "a mask that spells ranges out is those ranges",
        "a token that sees nothing has an empty range behind all media",
        MASK,
        "torch.stack([start, stop], dim=-1).masked_fill((start >= stop)[..., None], 0)",
        "torch.stack([start, stop.maximum(start)], dim=-1)",
        "tests/blocks/test_media_mask.py::test_a_mask_that_spells_ranges_out_is_those_ranges",
    ),
    Mutant(
        "runs know which tokens see anything",
        "not those that see the first medium alone",
        MASK,
        "return self.ranges[..., 0] < self.ranges[..., 1]",
        "return self.ranges[..., 1] > 1",
        "tests/blocks/test_media_mask.py::test_runs_know_what_their_mask_reaches",
    ),
    Mutant(
        "dense attention under any mask = oracle",
        "it attends to everything between the first and the last medium",
        MASK,
        "        if self.mask is None:\n            return dense_media_mask",
        "        if True:\n            return dense_media_mask",
        "tests/blocks/test_attention.py::test_any_mask_equals_the_loop_oracle_gradients_included",
    ),
    Mutant(
        "a mask that no ranges can say is for dense attention alone",
        "another algorithm may be forced on it",
        ATTENTION,
        'if runs.mask is not None and algorithm != "dense":',
        "if False:",
        "tests/blocks/test_attention.py::test_a_mask_that_no_ranges_can_say_is_for_dense_attention_alone",
    ),
    Mutant(
        "one graph serves every mask",
        "the mask is looked at under torch.compile",
        MASK,
        "not torch.compiler.is_compiling() and is_contiguous.all()",
        "is_contiguous.all()",
        "tests/test_compile.py::test_one_graph_serves_every_mask",
        unchecked=True,
    ),
    Mutant(
        "media that are not there are seen by nobody",
        "padding is seen where ranges say so",
        MASK,
        "if stop > media:",
        "if stop > media + 1:",
        "tests/test_modeling_flamingo.py::test_media_that_are_not_there_are_seen_by_nobody",
    ),
    Mutant(
        "media that are not there are seen by nobody, and a cache that refuses them is as it was",
        "it has counted them",
        MEDIA_CACHE,
        "had, held = (nothing, nothing) if",
        "self.num_media = nothing if self.num_media is None else self.num_media\n        "
        "had, held = (nothing, nothing) if",
        "tests/test_modeling_flamingo.py::test_media_that_are_not_there_are_seen_by_nobody",
    ),
    Mutant(
        "the order of media does not matter under a mask",
        "with a mask, the model makes caches, which follow its own rule",
        MODELING,
        "            else:\n                use_cache = False\n",
        "            else:\n                runs = None\n",
        "tests/test_modeling_flamingo.py::test_the_order_of_media_does_not_matter_under_a_mask",
    ),
    Mutant(
        "text in pieces with masks equals the full forward",
        "a mask counts the media that came along with its text",
        MODELING,
        "media_ranges = ranges_to_keep(media_ranges, media_mask)\n            elif",
        "media_ranges = ranges_to_keep(media_ranges, media_mask) * int(has_media)\n            elif",
        "tests/test_modeling_flamingo.py::test_text_in_pieces_with_masks_equals_the_full_forward",
    ),
    Mutant(
        "what is generated sees what the last token of its prompt sees",
        "it sees what the first one sees",
        MEDIA_CACHE,
        "return self._ranges[:, positions.clamp(0, last)]",
        "return self._ranges[:, positions.where(positions <= last, 0).clamp(0)]",
        "tests/test_generation.py::test_what_is_generated_sees_what_the_last_token_of_its_prompt_sees",
    ),
    Mutant(
        "what is generated sees what the last token of its prompt sees, with drafts, too",
        "a Flamingo that drafts follows its own rule",
        GENERATION,
        "pixel_values, num_frames, media_ranges=media_ranges)",
        "pixel_values, num_frames)",
        "tests/test_generation.py::test_what_is_generated_sees_what_the_last_token_of_its_prompt_sees",
    ),
    Mutant(
        "a conversation goes on with ranges",
        "the first ranges are taken for those of the new text",
        GENERATION,
        "return media_ranges[:, -text.shape[1] :]",
        "return media_ranges[:, : text.shape[1]]",
        "tests/test_generation.py::test_a_conversation_goes_on_with_ranges",
    ),
    Mutant(
        "logits that no token is to have hide no wrong cache",
        "differences are measured by the spread of all logits",
        BUILDER,
        "return logits[..., : None if head_weight is None else head_weight.shape[0]].float().std()",
        "return logits.float().std()",
        "tests/test_builder.py::test_logits_that_no_token_is_to_have_hide_no_wrong_cache",
    ),
]

README = """\
# Tests

They mirror the package. `strategies.py` says what hypothesis draws, `reference.py` holds the slow versions that the
library is compared with, `tiny_language_models.py` and `tiny_flamingo.py` the models, `tiny_videos.py` the videos.

`make test` runs pytest twice: with run-time checks of all annotated shapes, then, without them, the tests with the
marker `unchecked`: torch.compile, and our own errors about shapes. `make test-long` draws 2,000 examples a law;
`make test-slow` runs what takes long or needs a tool of its own.

## Each law can fail

`make mutants` puts one deliberate bug at a time into a copy of the project and sees the test fail. It writes this
table; all {count} bugs were caught.

| law | deliberate bug | caught by |
|---|---|---|
"""


def fails(mutant: Mutant | None, tests: list[str], *, unchecked: bool) -> tuple[bool, str]:
    """Run tests in a copy of the project that has the bug, if any."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("examples", "flamingo_blocks", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is not None:
            path = copy / mutant.path
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        options = ["-o", "addopts=", "-m", "unchecked"] if unchecked else []
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, *tests]
        environment = {**os.environ, "PYTHONPATH": folder, "HYPOTHESIS_PROFILE": "ci", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {' '.join(tests)}:\n{result.stdout}{result.stderr}")
    return result.returncode == 1, result.stdout


def main() -> None:
    """Check that the tests pass, then that each bug makes its own fail."""
    for mutant in MUTANTS:
        if (count := (ROOT / mutant.path).read_text().count(mutant.old)) != 1:
            raise SystemExit(f"{mutant.path} must hold once, but does {count} times: {mutant.old}")
    for unchecked in (False, True):
        tests = sorted({mutant.test for mutant in MUTANTS if mutant.unchecked == unchecked})
        failed, printed = fails(None, tests, unchecked=unchecked)
        if failed:
            raise SystemExit(f"the tests must pass before bugs are put in:\n{printed}")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = pool.map(lambda mutant: fails(mutant, [mutant.test], unchecked=mutant.unchecked)[0], MUTANTS)
        caught = list(tqdm(results, total=len(MUTANTS), desc="mutants"))
    survivors = [mutant for mutant, was_caught in zip(MUTANTS, caught, strict=True) if not was_caught]
    for mutant in survivors:
        print(f"NOT CAUGHT: {mutant.bug} ({mutant.test})")
    if survivors:
        raise SystemExit(1)
    rows = "".join(f"| {mutant.law} | {mutant.bug} | `{mutant.test}` |\n" for mutant in MUTANTS)
    (ROOT / "tests" / "README.md").write_text(README.format(count=len(MUTANTS)) + rows)
    print(f"All {len(MUTANTS)} caught.")


if __name__ == "__main__":
    main()
