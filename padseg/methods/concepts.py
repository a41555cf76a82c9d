"""ConceptAttention: segment by names that are no part of the prompt, but a stream of their own that reads the picture.

Names go through the text's half of the blocks; what their attention gives is compared with what that of image tokens gives (Helbling et
al., ICML 2025). The stream is in backbones/third_stream.py, the comparison in stages/concept_maps.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.backbones import opened
from padseg.backbones.spec import FAMILY_FACTS
from padseg.images import Readable, as_image
from padseg.methods import seg4diff, stages
from padseg.methods.goca import caption_of, captions_text, read_captions
from padseg.methods.open_vocabulary import BACKGROUND, COLUMNS_OF, ENCODERS, UNUSED, as_classes, name_regions, warn_of_untrained
from padseg.methods.options import (
    REFINEMENTS,
    SCALE,
    SHARE,
    Range,
    check_options,
    filled,
    geometry_option,
    in_list,
    model_settings,
    option,
    order_option,
    own,
    plain_settings,
    refine_layers_option,
    require,
    require_family,
    seed_option,
    side_option,
)
from padseg.types import Prompt, Proposals, TokenMaps

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.backbones.noise import NoiseLevel
    from padseg.backbones.spec import Spec
    from padseg.methods.options import Setting
    from padseg.methods.stages.concept_maps import Concepts, Reading
    from padseg.types import Image, LabelMap, Latent

TASK = 'classes'
FAMILIES = frozenset({'sd3', 'flux', 'flux2', 'auraflow'})
BACKGROUND_BY_RULE = False
READS = ('outputs', 'attention')
TOKENS = ('mean', 'first')
WORDINGS = ('alone', 'joined')
NORMALISATIONS = ('none', 'linear', 'length')
SEES = ('both', 'image', 'concepts', 'itself')  # as in backbones/third_stream.py
POOLED = ('prompt', 'zeros', 'apart')
NAMED = ('words', 'proposals')
LAST = 5  # double blocks that are read, where single ones follow
OFF = {'softmax': False}
PROTOCOLS: Mapping[str, Mapping[str, Any]] = {  # options of the released scripts
    'conceptattention': {**OFF, 'normalise': 'linear'},
    'conceptattention-single': {**OFF, 'normalise': 'linear'},
    'conceptattention-imagenet': OFF,
}
FLUX: Mapping[str, Any] = {'wording': 'alone', 'normalise': 'none', 'pooled': 'zeros', 'guidance': 0.0, 'noise': (0.5,)}
UNPUBLISHED: Mapping[str, Any] = {
    'wording': 'alone',
    'normalise': 'none',
    'pooled': 'prompt',
    'noise': (0.5,),
}  # Flux's, for models that nobody has read
SD3: Mapping[str, Any] = {
    'wording': 'joined',
    'normalise': 'length',
    'pooled': 'prompt',
    'noise': (0.602,),
}  # the third of SD3.5 Turbo's four steps


@dataclasses.dataclass(frozen=True)
class ConceptOptions:
    """Options of ConceptAttention. Options left open take the model's own values; see `resolve`.

    Raises UsageError for a value outside its range; the message gives the range.
    """

    layers: tuple[int, ...] = own('blocks that are read, whose maps are averaged, counted from 0', range=Range('distinct numbers >= 0', 0))
    noise: tuple[float, ...] | None = own(
        'noise levels, one forward pass each, whose maps are averaged',
        default="the model's; with proposals that of their step",
        range=Range('distinct levels in 0..1', 0, math.nextafter(1, 2)),
    )
    read: str = option(
        'outputs',
        'what of names and pixels is compared: the outputs of their attention, or queries of pixels with keys of names',
        choices=READS,
    )
    tokens: str = option('mean', 'what stands for a name: the mean of all its tokens, or the first, as released', choices=TOKENS)
    wording: str = own('how names are encoded: each one alone, or joined by spaces', choices=WORDINGS)
    normalise: str = own(
        "what becomes of names' outputs: nothing, shares over names in each channel, or vectors of length 1", choices=NORMALISATIONS
    )
    softmax: bool = own('softmax over names in each layer, before layers are averaged', default='on')
    sees: str = option('both', 'what names attend to: image and names, one of these, or each token only to itself', choices=SEES)
    pooled: str = own(
        "the pooled text vector: the prompt's for all, zeros for all, or the prompt's with zeros for names alone", choices=POOLED
    )
    caption: str | None = option(None, 'the prompt, which the picture reads, and names do not', default='the empty text')
    captions: str | None = option(None, 'JSON file with a prompt for each picture by its name', default='none')
    encoders: str = own('text encoders to use: CLIP-L, CLIP-G, T5', choices=ENCODERS)
    unused: str = option('zeros', "what replaces T5's tokens if T5 is not used", choices=UNUSED)
    guidance: float | None = own(
        'guidance strength that Flux and FLUX.2 are told',
        range=Range('a number >= 0', 0, 1e9),
        default='0.0; FLUX.2 its own; other models have none',
    )
    background_words: tuple[str, ...] = option(
        (), 'further names: pixels that score highest for one of them are background', default='none'
    )
    background_below: float | None = option(
        None,
        'pixels whose best score is below this are background',
        default='none',
        range=Range('a finite number', -math.nextafter(math.inf, 0), math.inf),
    )
    above_mean: bool = option(
        False, "take every map's mean from it; pixels where none is above 0 are background, as in the paper's masks of one class"
    )
    order: int = order_option()
    refine_layers: tuple[int, ...] = refine_layers_option()
    on: str = option(
        'words', 'what to classify: every pixel by its scores, or the proposals of `padseg run` by their mean score', choices=NAMED
    )
    geometry: str = geometry_option()
    side: int = side_option()
    refine: str = own('how maps are enlarged, as for `padseg run`', choices=REFINEMENTS)
    superpixels: float = own('superpixels inside which maps are averaged, as for `padseg run`', range=SCALE)
    min_area: float = own('parts below this share of the picture go to the neighbour with the longest common border', range=SHARE)
    seed: int = seed_option()

    def __post_init__(self) -> None:
        check_options(self)
        require(self.caption is None or self.captions is None, 'give either caption or captions')
        require(self.on == 'words' or not (self.caption or self.captions), 'proposals are made with the empty prompt: leave out captions')

    def resolve(self, spec: Spec) -> ConceptOptions:
        """Fill in everything left open for a model. UsageError for what the model does not have."""
        settings = settings_of(spec)
        if self.on == 'proposals':  # both from one forward pass, with the noise of the proposals
            settings['noise'] = None
        resolved = filled(self, settings | (seg4diff.UNREFINED if self.geometry != 'whole' else {}))
        used, facts = (*resolved.layers, *resolved.refine_layers), FAMILY_FACTS[spec.family]
        require(max(used) < spec.layers, f'layers are in 0..{spec.layers - 1} for {spec.repo}; got {in_list(used)}')
        require(resolved.guidance is None or facts.guided, f'{spec.repo} takes no guidance strength')
        require(resolved.pooled == 'prompt' or facts.pooled, f'{spec.repo} has no pooled text vector: pooled is prompt')
        require(
            not (resolved.encoders in ('t5', 'l+g+t5') and self.unused == 'dropped'),
            f'T5 can be dropped only if it is not used; encoders are {resolved.encoders}',
        )
        return resolved


Options = ConceptOptions


def settings_of(spec: Spec) -> dict[str, Any]:
    """The method's settings for a model: those of the released code, overridden by the model folder's `padseg.json`."""
    regions = seg4diff.settings_of(spec)
    shared = {name: regions[name] for name in ('side', 'refine', 'superpixels', 'min_area')}
    row = {
        'softmax': True,
        **{'flux': FLUX, 'sd3': SD3}.get(spec.family, UNPUBLISHED),
        'layers': layers_of(spec),
        'refine_layers': (spec.layer,),
        'encoders': spec.encoders,
    }
    return model_settings(ConceptOptions, 'concepts', spec, row | shared)


def layers_of(spec: Spec) -> tuple[int, ...]:
    """All blocks of SD3; of the others the last double blocks, which are taken to be the published models' share of all."""
    one_in = FAMILY_FACTS[spec.family].double
    if one_in == 1:
        return tuple(range(spec.layers))
    double = max(1, spec.layers // one_in)
    return tuple(range(max(0, double - LAST), double))


class Prepared(NamedTuple):
    """A model with the names to look for. prompt: the same for all pictures, or None with captions by picture.

    proposals: how to make the regions to classify; None to classify pixels.
    """

    options: ConceptOptions
    classes: tuple[str, ...]
    concepts: Concepts
    reading: Reading
    prompt: Prompt | None
    captions: Mapping[str, str]
    proposals: seg4diff.Prepared | None
    backbone: Backbone
    keep: bool = True


def deepest(options: ConceptOptions, spec: Spec) -> int | None:
    """The last block to load: the one behind the last that is read, as outputs need all of their block."""
    settings = settings_of(spec)
    layers = options.layers or settings['layers']
    last = max(layers) + (options.read == 'outputs')
    if options.order:
        last = max(last, *(options.refine_layers or settings['refine_layers']))
    if options.on == 'proposals':
        last = max(last, spec.layer)
    return last if last < spec.layers else None


def prepare(backbone: Backbone, options: ConceptOptions, classes: Sequence[str] = (), keep: bool = True) -> Prepared:
    """Encode all names once, and the caption; keep: also in padseg's cache.

    UsageError for options that the model does not support, for captions that cannot be read or are too long, and for names that are
    missing, duplicate, too long, or without tokens.
    """
    from padseg.backbones.texts import kept_texts
    from padseg.methods.stages.concept_maps import concepts_of

    require_family('concepts', FAMILIES, backbone)
    names = stages.checked_names(classes)
    resolved = options.resolve(backbone.spec)
    everything = stages.checked_names([*names, *resolved.background_words])
    warn_of_untrained(backbone, everything)
    for layer in range(max(resolved.layers) + 1):  # fails early if a block was not loaded, or is compiled
        backbone.attention_module(layer, ('output',) if layer in resolved.layers and resolved.read == 'outputs' else ())
    single = [layer for layer in resolved.layers if not hasattr(backbone.family.blocks(backbone.transformer)[layer], 'norm1_context')]
    require(
        not single, f'layers are blocks with weights of their own for the text; {in_list(single)} of {backbone.identity.model} have none'
    )
    told = options.guidance is None or bool(getattr(backbone.transformer.config, 'guidance_embeds', False))
    require(told, f'{backbone.identity.model} is told no guidance strength: leave out --guidance')
    columns = COLUMNS_OF[resolved.encoders]
    concepts = concepts_of(everything, kept_texts(backbone, keep), resolved.encoders, columns, resolved.tokens, resolved.wording)
    proposals = seg4diff.prepare(backbone, proposal_options(options)) if options.on == 'proposals' else None
    captions = read_captions(Path(resolved.captions)) if resolved.captions else {}
    prepared = Prepared(resolved, names, concepts, reading_of(backbone, resolved, proposals), None, captions, proposals, backbone, keep)
    return prepared if captions else prepared._replace(prompt=prompt_of(resolved.caption or '', prepared))


def reading_of(backbone: Backbone, options: ConceptOptions, proposals: seg4diff.Prepared | None) -> Reading:
    import torch

    from padseg.methods.stages.concept_maps import Reading

    return Reading(
        options.layers,
        options.read,
        options.normalise,
        options.softmax,
        options.sees,
        torch.zeros_like(backbone.null_prompt.pooled) if options.pooled == 'apart' else None,
        options.guidance,
        options.refine_layers,
        options.order,
        proposals.options.layer if proposals else None,
    )


def proposal_options(options: ConceptOptions) -> seg4diff.Options:
    """The options that `padseg run` would use for the same picture."""
    return seg4diff.Options(**{name: getattr(options, name) for name in ('geometry', 'side', 'refine', 'superpixels', 'min_area', 'seed')})


def prompt_of(caption: str, prepared: Prepared) -> Prompt:
    """The prompt that the picture reads; the empty one is the model's own. UsageError for one that is too long."""
    import torch

    from padseg.backbones.texts import kept_texts

    backbone, options = prepared.backbone, prepared.options
    prompt = backbone.null_prompt
    if caption:
        texts = kept_texts(backbone, prepared.keep)
        for tokens in texts.tokens(caption, options.encoders).values():
            require(
                len(tokens.spans) <= tokens.slots, f'the caption {caption!r:.100} is too long: {len(tokens.spans)} of {tokens.slots} tokens'
            )
        prompt = Prompt(*texts.encode(caption, options.encoders, options.unused), (), (), mask=texts.mask(caption))
    elif prepared.proposals:
        prompt = stages.read_prompt(backbone, prepared.proposals.options.tokens)
    return prompt._replace(pooled=torch.zeros_like(prompt.pooled)) if options.pooled == 'zeros' else prompt


def maps(images: Sequence[Image], prepared: Prepared, names: Sequence[str] = ()) -> list[TokenMaps]:
    """Scores of all classes, (C, h, w) for each picture, then that of the best background word, if there are any.

    Token maps of the empty prompt follow for proposals, from the same forward pass. names: of the pictures, by which captions are known.
    """
    options, backbone = prepared.options, prepared.backbone

    def levels(tokens: int) -> list[NoiseLevel]:
        from padseg.backbones.noise import flow_level_at

        if options.noise is None:  # with proposals
            assert prepared.proposals is not None
            return [backbone.noise_level(prepared.proposals.options.step, tokens)]
        return [flow_level_at(level) for level in options.noise]

    latents = [stages.encode_levels(image, backbone, options, levels) for image in images]  # one per level
    if not prepared.captions:
        assert prepared.prompt is not None
        return scored(latents, prepared, prepared.prompt)
    shown = [caption_of(prepared.captions, name, options.captions) for name in (names or [''] * len(images))]
    return [scored([own_latents], prepared, prompt_of(text, prepared))[0] for own_latents, text in zip(latents, shown, strict=True)]


def scored(latents: Sequence[Sequence[Latent]], prepared: Prepared, prompt: Prompt) -> list[TokenMaps]:
    """The maps of pictures that share a prompt. latents: of each picture, one per noise level."""
    read = partial(maps_of_latents, prepared=prepared, prompt=prompt)
    by_level = [stages.batched(of_level, prepared.backbone, read) for of_level in zip(*latents, strict=True)]
    return [
        TokenMaps(stages.mean_of_steps([own_maps.maps for own_maps in own]), own[0].names, own[0].frame)
        for own in zip(*by_level, strict=True)
    ]


def maps_of_latents(latents: list[Latent], prepared: Prepared, prompt: Prompt) -> list[TokenMaps]:
    """The maps of latents with the same shape and noise level, from one forward pass."""
    from padseg.methods.stages.concept_maps import concept_maps

    found = concept_maps(latents, prepared.backbone, prompt, prepared.concepts, prepared.reading)
    names = prepared.classes + ((BACKGROUND,) if prepared.options.background_words else ())
    results = []
    for number, latent in enumerate(latents):
        maps = stages.scale_scores(found.maps[number].float(), len(prepared.classes), 'raw')
        if found.pads is None:
            results.append(TokenMaps(maps, names, latent.frame))
        else:
            results.append(TokenMaps(stages.joined_maps([maps, found.pads[number]]), names + prompt.names, latent.frame))
    return results


def labels(image: Image, maps: TokenMaps, prepared: Prepared) -> LabelMap:
    """Class of every pixel, 1..C in their order, 0 = background or not seen by the model, without a forward pass."""
    options, classes = prepared.options, prepared.classes
    count = len(classes) + bool(options.background_words)
    values = maps.maps[:count]
    if options.above_mean:
        values = values - values.mean((1, 2), keepdim=True)
    floor = max(0.0, options.background_below or 0.0) if options.above_mean else options.background_below
    scores = TokenMaps(values, maps.names[:count], maps.frame)
    if prepared.proposals:
        pads = TokenMaps(maps.maps[count:], maps.names[count:], maps.frame)
        return name_regions(seg4diff.labels(image, pads, prepared.proposals), scores, classes, floor)
    values = stages.with_floor(values, floor)  # a score below the floor never wins
    inside = stages.superpixels_of(image, options.superpixels) if options.superpixels else None  # (H, W)
    strongest = Proposals(values, tuple((number,) for number in range(len(values))), maps.frame)
    regions = stages.label_map(strongest, inside, options.min_area > 0, options.min_area, image, options.refine)
    return as_classes(regions.labels, [number for (number,) in regions.tokens], classes)


def recorded(options: ConceptOptions, spec: Spec) -> dict[str, Setting]:
    """All settings that affect the results, for a record: the options, those of the proposals, and what the file of captions holds."""
    settings = plain_settings(options.resolve(spec))
    if options.on == 'proposals':
        settings |= {f'proposals_{name}': value for name, value in seg4diff.recorded(proposal_options(options), spec).items()}
    if options.captions:
        read_captions(Path(options.captions))
        settings['captions_sha256'] = hashlib.sha256(captions_text(Path(options.captions))).hexdigest()
    return settings


def concept_scores(
    image: Readable, backbone: Backbone | str, classes: Sequence[str], options: ConceptOptions = ConceptOptions()
) -> TokenMaps:
    """The scores that `label` decides by, (C, h, w), with the names of the classes, then background."""
    words = dataclasses.replace(options, on='words')
    return maps([as_image(image)], prepare(opened(backbone, partial(deepest, words)), words, classes))[0]
