"""Names in prompts: alignment against walking through the letters, budgets, and names that cannot be used."""

from __future__ import annotations

import json
import shutil

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from padseg.backbones import load
from padseg.backbones.sd3_text import CLIPS
from padseg.backbones.texts import texts_of
from padseg.errors import ModelUnavailable, UsageError
from padseg.methods.open_vocabulary import PROMPTS, LabelOptions
from padseg.methods.stages.prompts import checked_names, columns_of, prompts_of, split, worded

SLOTS = 77


@pytest.fixture(scope='module')
def texts(speller):
    return texts_of(speller)


def resolved(backbone, **options):
    return LabelOptions(**options).resolve(backbone.spec)


def test_the_three_ways_to_word_names():
    names = ['cat', 'traffic light']
    assert worded(names, 'joined') == ('cat traffic light', tuple(names), ((0, 3), (4, 17)))
    assert worded(names, 'template') == ('a photo of a cat, traffic light', tuple(names), ((13, 16), (18, 31)))
    assert worded(names[1:], 'per-class') == ('a photo of a traffic light', ('traffic light',), ((13, 26),))
    for mode in PROMPTS:
        text, _, spans = worded(names, mode)
        assert [text[start:end] for start, end in spans] == names


def letters_of_tokens(tokenizer, text: str) -> list[str]:
    """What each token spells, without spaces; nothing for special tokens but `!`, which is one of the second CLIP tokenizer."""
    words = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    special = {*tokenizer.all_special_tokens} - {'!'}
    return ['' if word in special else word.removesuffix('</w>').replace('▁', '') for word in words]


def walked(tokenizer, wording) -> list[list[int]]:
    """Positions of the tokens of each name, by spelling the text letter by letter."""
    owner = [next((number for number, (start, end) in enumerate(wording.spans) if start <= place < end), None) for place in range(999)]
    places = [place for place, letter in enumerate(wording.text) if letter != ' ']
    found = [[] for _ in wording.names]
    spelled = 0
    for position, letters in enumerate(letters_of_tokens(tokenizer, wording.text)):
        owners = {owner[places[spelled + offset]] for offset in range(len(letters))} - {None}
        for number in owners:
            found[number].append(position)
        spelled += len(letters)
    assert spelled == len(places)
    return found


KNOWN = st.sampled_from(['cat', 'cats', 'traffic', 'light', 'photo', 'of', 'a'])
WORD = st.text('catlighrfo,.-3!', min_size=1, max_size=6) | KNOWN | st.just("cat's")
LETTERS = st.text('catlighrfo', min_size=1, max_size=6) | KNOWN


def named(word):
    return st.lists(st.lists(word, min_size=1, max_size=3).map(' '.join), min_size=1, max_size=5)


def check_columns(names, mode, texts, tokenizer, encoders, first):
    """Against walking; encoders: the arm that `tokenizer` alone cuts for, whose columns start at `first`."""
    wording = worded(names[:1] if mode == 'per-class' else names, mode)
    (tokens,) = texts.tokens(wording.text, encoders).values()
    for name, span, own in zip(wording.names, wording.spans, walked(tokenizer, wording), strict=True):
        assert columns_of(name, span, tokens) == [first + place for place in own]


@hypothesis.given(named(WORD), st.sampled_from(PROMPTS))
@hypothesis.settings(max_examples=120, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_columns_are_those_found_letter_by_letter(texts, names, mode):
    check_columns(names, mode, texts, texts.clip_tokenizers['tokenizer'], 'l', 0)
    check_columns(names, mode, texts, texts.clip_tokenizers['tokenizer_2'], 'g', 0)
    check_columns(names, mode, texts, texts.t5_tokenizer, 't5', SLOTS)
    text = worded(names, mode).text
    both = texts.tokens(text, 'l+g+t5')
    assert (both['clip'], both['t5']) == (texts.tokens(text, 'l')['clip'], texts.tokens(text, 't5')['t5'])


@hypothesis.given(named(LETTERS), st.sampled_from(['joined', 'per-class']))
@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_columns_of_flux_are_those_found_letter_by_letter(flux, names, mode):
    """Its vocabulary here has letters alone, so no commas between names."""
    texts = texts_of(flux)
    check_columns(names, mode, texts, texts.tokenizer, 't5', 0)


def test_a_part_of_another_name_is_not_it(texts, speller):
    """ "car" inside "carpet", a plural, and one name after the other."""
    for tokenizer in ('tokenizer', 'tokenizer_2'):
        assert texts.clip_tokenizers[tokenizer].tokenize('carpet car cat') == ['ca', 'r', 'p', 'e', 't</w>', 'ca', 'r</w>', 'cat</w>']
    (prompt,) = prompts_of(['carpet', 'car', 'cat'], texts, resolved(speller))
    assert prompt.picked == (1, 2, 3, 4, 5, 6, 7, 8)
    assert prompt.names == ('carpet',) * 5 + ('car',) * 2 + ('cat',)
    assert prompt.weights == (0.2,) * 5 + (0.5,) * 2 + (1.0,)


def test_several_words_and_tokens_are_one_name(texts, speller):
    (prompt,) = prompts_of(['cat', 'traffic  light'], texts, resolved(speller, encoders='l+g+t5'))
    names, read = ('cat', 'traffic light'), {name: [] for name in ('cat', 'traffic light')}
    for column, name in zip(prompt.picked, prompt.names, strict=True):
        read[name].append(column)
    # tra ff i c</w> | li ght</w>, then ▁tra ffic | ▁li ght after CLIP's slots
    assert read == {'cat': [1, SLOTS], 'traffic light': [*range(2, 8), *range(SLOTS + 1, SLOTS + 5)]}
    for name in names:
        assert sum(weight for weight, own in zip(prompt.weights, prompt.names, strict=True) if own == name) == pytest.approx(1)
    assert prompt.weights[2:8] == (1 / 12,) * 6 and prompt.weights[8:] == (1 / 8,) * 4


@pytest.mark.parametrize(('columns', 'halves'), [('clip', {0}), ('t5', {1}), ('both', {0, 1})])
def test_which_columns_are_read(texts, speller, columns, halves):
    (prompt,) = prompts_of(['cat', 'light'], texts, resolved(speller, encoders='l+g+t5', columns=columns))
    assert {column // SLOTS for column in prompt.picked} == halves


@pytest.mark.parametrize('mode', PROMPTS)
@pytest.mark.parametrize('encoders', CLIPS)
def test_two_hundred_names_are_split_over_prompts(texts, speller, mode, encoders):
    names = [f'thing{number}' for number in range(200)]
    options = resolved(speller, prompt=mode, encoders=encoders)
    wordings = split(names, texts, options)
    assert [name for wording in wordings for name in wording.names] == names
    assert len(wordings) == 200 if mode == 'per-class' else 10 < len(wordings) < 60
    for wording, after in zip(wordings, [*wordings[1:], None], strict=True):
        sizes = [len(tokens.spans) for tokens in texts.tokens(wording.text, encoders).values()]
        assert max(sizes) <= SLOTS
        if after and mode != 'per-class':  # no prompt has room left for the next name
            longer = worded([*wording.names, after.names[0]], mode)
            assert max(len(tokens.spans) for tokens in texts.tokens(longer.text, encoders).values()) > SLOTS


def test_every_name_of_split_prompts_has_columns(texts, speller):
    prompts = prompts_of([f'thing{number}' for number in range(40)], texts, resolved(speller))
    assert len(prompts) > 2
    for prompt in prompts:
        assert max(prompt.picked) <= 75
        assert prompt.embeds.shape == (1, 2 * SLOTS, 160)


@pytest.mark.parametrize('encoders', ['l', 't5'])
def test_the_longest_name_that_fits(texts, speller, encoders):
    room = SLOTS - (2 if encoders == 'l' else 1 + 1)  # T5 has no start token, but one for the space before the word
    (prompt,) = prompts_of(['x' * room], texts, resolved(speller, encoders=encoders))
    assert len(prompt.picked) == room
    with pytest.raises(UsageError, match=f"^the name '{'x' * (room + 1)}' is too long: its prompt takes 78 tokens, .* of 77$"):
        prompts_of(['cat', 'x' * (room + 1)], texts, resolved(speller, encoders=encoders))


def test_unicode_names(texts, speller):
    names = ['crème brûlée', 'Straße', '日本', 'cafe\N{COMBINING ACUTE ACCENT}', '\N{CAT FACE}']
    (prompt,) = prompts_of(names, texts, resolved(speller))
    assert list(dict.fromkeys(prompt.names)) == names
    assert prompt.picked == tuple(range(1, 1 + len(prompt.picked)))  # byte by byte, without gap or overlap
    assert prompt.names.count('日本') == 6 and prompt.names.count('\N{CAT FACE}') == 4
    prompts_of(names[:3], texts, resolved(speller, encoders='t5'))
    with pytest.raises(UsageError, match=f"^the tokenizer has no tokens for the name '{names[4]}'$"):
        prompts_of([*names[:3], names[4]], texts, resolved(speller, encoders='t5'))


@pytest.mark.parametrize('name', ['<|endoftext|>', 'cat <|startoftext|>', 'x<|endoftext|>x'])
def test_names_that_are_no_words(texts, speller, name):
    with pytest.raises(UsageError, match='^the tokenizer has no tokens for the name'):
        prompts_of(['cat', name], texts, resolved(speller))


@pytest.mark.parametrize(
    ('names', 'words'),
    [
        ([], 'there are no class names'),
        (['cat', ' '], 'the name of class 2 of 2 is empty'),
        (['cat', 'dog', 'cat'], 'two classes have the same name: cat and cat'),
        (['traffic light', 'traffic   light'], 'two classes have the same name: traffic light and traffic light'),
        (['Cat', 'cat'], 'two classes have the same name: Cat and cat'),
        (['caf\N{LATIN SMALL LETTER E WITH ACUTE}', 'cafe\N{COMBINING ACUTE ACCENT}'], 'two classes have the same name'),
    ],
)
def test_names_that_are_refused(names, words):
    with pytest.raises(UsageError, match=f'^{words}') as caught:
        checked_names(names)
    assert caught.value.exit_code == 2


def test_a_model_without_t5(backbone):
    with pytest.raises(UsageError, match='has no T5: encoders is one of l, g, l\\+g$'):
        prompts_of(['cat'], texts_of(backbone), resolved(backbone, encoders='t5'))


def test_encoders_of_other_families_are_refused(texts):
    for ask in (lambda: texts.tokens('cat', 'qwen3'), lambda: texts.encode('cat', 'qwen3', 'zeros')):
        with pytest.raises(UsageError, match=r'encoders is one of l, g, l\+g, t5, l\+g\+t5; got qwen3'):
            ask()


@pytest.mark.parametrize('encoders', CLIPS)
def test_a_name_may_have_what_a_tokenizer_pads_with(texts, speller, encoders):
    assert texts.clip_tokenizers['tokenizer_2'].pad_token == '!'
    (prompt,) = prompts_of(['cat', 'li!', '!'], texts, resolved(speller, encoders=encoders, columns='t5' if encoders == 't5' else 'clip'))
    first = SLOTS if encoders == 't5' else 1
    # cat</w> | l i</w> !</w> | !</w>; ▁cat | ▁li ! | !, after a token for its space that stands for no letter
    columns = (0, 1, 2, 4) if encoders == 't5' else (0, 1, 2, 3, 4)
    assert prompt.picked == tuple(first + column for column in columns)
    assert [prompt.names.count(name) for name in ('cat', 'li!', '!')] == [1, len(columns) - 2, 1]


def changed_tokenizer(folder, part, change):
    path = folder / part / 'tokenizer.json'
    state = json.loads(path.read_text())
    change(state['model'])
    path.write_text(json.dumps(state))


def test_exclamation_marks_that_are_cut_differently(texts_folder, tmp_path):
    """Two of them are one token of the first tokenizer, two of the second, whose pad token is one."""

    def merge(model):
        model['vocab']['!!</w>'] = model['vocab'].pop('~</w>')
        model['merges'].append(['!', '!</w>'])

    folder = shutil.copytree(texts_folder, tmp_path / 'model')
    for part in ('tokenizer', 'tokenizer_2'):
        changed_tokenizer(folder, part, merge)
    backbone = load(str(folder), device='cpu')
    texts = texts_of(backbone)
    with pytest.raises(
        UsageError, match="^the two CLIP tokenizers cut 'cat!!' differently, as one pads with !: use encoders l or g, or no !$"
    ):
        prompts_of(['cat!!'], texts, resolved(backbone))
    for encoders, spans in (('l', [(0, 3), (3, 5)]), ('g', [(0, 3), (3, 4), (4, 5)])):
        tokens = texts.tokens('cat!!', encoders)['clip']
        assert list(tokens.spans[1:-1]) == spans and not any(tokens.strange[1:-1])


def test_tokenizers_that_disagree(texts_folder, tmp_path):
    folder = shutil.copytree(texts_folder, tmp_path / 'model')
    changed_tokenizer(folder, 'tokenizer_2', lambda model: model.update(merges=model['merges'][2:]))
    backbone = load(str(folder), device='cpu')
    with pytest.raises(ModelUnavailable, match='the two CLIP tokenizers of .* cut .cat. differently'):
        prompts_of(['cat'], texts_of(backbone), resolved(backbone))
    (prompt,) = prompts_of(['cat'], texts_of(backbone), resolved(backbone, encoders='g'))
    assert prompt.picked == (1, 2, 3)


# what the encoders give


def halves(prompt) -> tuple[torch.Tensor, torch.Tensor]:
    return prompt.embeds[0, :SLOTS], prompt.embeds[0, SLOTS:]


def test_the_arms_change_the_intended_channels_and_columns_only(texts, speller):
    """CLIP-L has channels 0..63, CLIP-G 64..159 of the first half and of the pooled vector; T5 the second half."""
    prompts = {encoders: prompts_of(['cat', 'light'], texts, resolved(speller, encoders=encoders))[0] for encoders in CLIPS}
    full, t5 = halves(prompts['l+g+t5'])
    pooled = prompts['l+g+t5'].pooled[0]
    assert full.std(0).min() > 0 and t5.std(0).min() > 0 and pooled.abs().min() > 0
    for encoders, prompt in prompts.items():
        arms = encoders.split('+')
        left, right = halves(prompt)
        for arm, channels in (('l', slice(0, 64)), ('g', slice(64, 160))):
            expected = 1.0 if arm in arms else 0.0
            assert torch.equal(left[:, channels], expected * full[:, channels])
            assert torch.equal(prompt.pooled[0, channels], expected * pooled[channels])
        assert torch.equal(right, t5 * float('t5' in arms))


def test_t5_can_be_dropped(texts, speller):
    (zeros,) = prompts_of(['cat'], texts, resolved(speller))
    (dropped,) = prompts_of(['cat'], texts, resolved(speller, unused='dropped'))
    assert dropped.embeds.shape == (1, SLOTS, 160)
    assert torch.equal(dropped.embeds, zeros.embeds[:, :SLOTS]) and torch.equal(dropped.pooled, zeros.pooled)
    assert dropped.picked == zeros.picked
    with pytest.raises(UsageError, match='T5 can be dropped only if it is not used'):
        resolved(speller, encoders='t5', unused='dropped')
    with pytest.raises(UsageError, match='columns of t5 need its encoder; encoders are l'):
        resolved(speller, encoders='l', columns='t5')


@pytest.mark.parametrize('text', ['', 'a photo of a cat, light'])
def test_embeddings_are_those_of_the_pipeline(texts_folder, texts, text):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(texts_folder)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=text, prompt_2=text, prompt_3=text, do_classifier_free_guidance=False, max_sequence_length=SLOTS
        )
    own, own_pooled = texts.encode(text, 'l+g+t5', 'zeros')
    assert torch.equal(own, embeds) and torch.equal(own_pooled, pooled)


def test_embeddings_are_kept_and_encoders_are_not_read_again(texts_folder, speller, tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path))
    first = texts_of(speller)
    expected = first.encode('cat light', 'l+g+t5', 'zeros')
    assert {'pipeline', 't5_encoder'} <= vars(first).keys()
    assert len(list((tmp_path / 'prompts').iterdir())) == 2
    again = texts_of(speller)
    for arm in CLIPS:
        again.encode('cat light', arm, 'zeros')
    assert all(torch.equal(one, two) for one, two in zip(again.encode('cat light', 'l+g+t5', 'zeros'), expected, strict=True))
    assert not {'pipeline', 't5_encoder'} & vars(again).keys()
    texts_of(speller, keep=False).encode('light cat', 'l+g+t5', 'zeros')
    assert len(list((tmp_path / 'prompts').iterdir())) == 2


def test_clip_alone_reads_no_t5(speller, tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path))
    reader = texts_of(speller)
    prompts_of(['cat'], reader, resolved(speller))
    assert not {'t5_encoder', 't5_tokenizer'} & vars(reader).keys()
