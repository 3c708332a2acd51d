"""Arrays that a library keeps are found by all that they depend on, and made again where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from lightning_modules.library.encoders import HashingEncoder, SentenceEncoder
from lightning_modules.library.experts import Experts
from lightning_modules.library.identity import identity_of
from lightning_modules.library.layers import LoraStack
from lightning_modules.library.loading import stack_factors
from lightning_modules.library.publish import write_expert
from lightning_modules.library.routers.base import kept_settings, missing_descriptions
from lightning_modules.library.routers.retrieval import RetrievalRouter
from lightning_modules.library.routers.token import ArrowRouter, CentroidRouter, SpectralRouter
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.merging.lora import LoraFactors

IN, OUT = 6, 8
RANKS = {"two": 2, "four": 4, "wide": 7}  # the last one is above the width


def factors(name: str, layer: str) -> LoraFactors:
    generator = torch.Generator().manual_seed(sum(map(ord, name + layer)))
    rank = RANKS[name]
    return LoraFactors(
        torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator), 2.0
    )


@pytest.fixture
def library(tmp_path):
    store = AdapterLibrary(tmp_path / "library", create=True)
    for name in RANKS:
        (tmp_path / name).mkdir()
        write_expert(tmp_path / name, {"q": tuple(factors(name, "q"))}, None)
        store.add(tmp_path / name, name)
    return store


def chosen(library, *names, layers=("q",), lacking=(), trained=False) -> Experts:
    """Experts of a library, stacked; `lacking` leave all layers but the first alone."""
    stacks = {
        layer: stack_factors(
            [None if name in lacking and layer != layers[0] else factors(name, layer) for name in names],
            torch.empty(OUT, IN),
            trained=trained,
        )
        for layer in layers
    }
    return Experts(names, {name: (name,) for name in names}, stacks, library, {"dtype": "float32"})


def lengths(experts, x):
    return torch.stack([(f.B @ f.A @ x).norm() * f.scaling for f in (factors(n, "q") for n in experts.names)])


def test_spectra_serve_stacks_of_other_ranks(library):
    """The issue: rank 2 alone, then beside rank 4, and once more."""
    x = torch.randn(IN, generator=torch.Generator().manual_seed(1))
    fresh = {}
    for names in (
        ["two"],
        ["two", "four"],
        ["two", "four"],
        ["four", "wide", "two"],
        ["two"],
        ["wide", "two"],
    ):
        experts = chosen(library, *names)
        own = ready_layer(SpectralRouter(None), experts)
        torch.testing.assert_close(own.scores(x[None, None])[0, 0], lengths(experts, x), rtol=1e-4, atol=1e-5)
        # Kept or just made, the same numbers.
        table = fresh.setdefault(tuple(names), own.own)
        assert torch.equal(table, own.own)
        assert own.own.shape[1] == min(IN, max(RANKS[name] for name in names))


def ready_layer(router, experts):
    router.prepare(experts)
    return router.for_layer("q")


@pytest.mark.parametrize("router", [ArrowRouter, SpectralRouter])
def test_what_is_damaged_or_does_not_fit_is_made_again(library, router):
    experts = chosen(library, "two", "four")
    expected = ready_layer(router(None), experts).own.clone()
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:-3]), lambda file: file.write_bytes(b"")):
        for file in (library.root / "arrays").iterdir():
            damage(file)
        assert torch.equal(ready_layer(router(None), experts).own, expected)
    # Sound files of another shape or of other layers, as an older version might have left.
    kind = {ArrowRouter: "arrow", SpectralRouter: "spectrum"}[router]
    settings = {**experts.settings, "layers": ["q"]}
    for wrong in ({"q": torch.ones(IN + 1)}, {"k": torch.ones(IN)}):
        library.put_arrays("two", kind, wrong, settings)
        assert torch.equal(ready_layer(router(None), experts).own, expected)


def test_experts_that_are_trained_leave_nothing_and_find_nothing(library):
    frozen = chosen(library, "two", "four")
    kept = ready_layer(ArrowRouter(1), frozen).own.clone()
    trained = chosen(library, "two", "four", trained=True)
    stack = trained.layers["q"]
    assert isinstance(stack, LoraStack)
    torch.nn.init.normal_(stack.A, generator=torch.Generator().manual_seed(5))
    now = ready_layer(ArrowRouter(1), trained).own
    assert torch.equal(now, stack.prototypes())
    assert not torch.equal(now, kept)
    assert torch.equal(ready_layer(ArrowRouter(1), frozen).own, kept)


def test_types_of_weights_and_what_was_subtracted_are_told_apart(library):
    experts = chosen(library, "two", "four")
    kept = ready_layer(ArrowRouter(1), experts).own.clone()
    half = replace(experts, settings={"dtype": "bfloat16"})
    half.layers["q"].get_buffer("A").copy_(torch.randn(2, 4, IN))
    assert not torch.equal(ready_layer(ArrowRouter(1), half).own, kept)


def centroids(library, experts, *names):
    router = CentroidRouter()
    for number, name in enumerate(names):
        arrays = {layer: torch.eye(IN)[number] for layer in experts.layers}
        library.put_arrays(name, router.kind, arrays, kept_settings(router, experts, name))
    return router


def test_centroids_made_before_other_layers_came_in_still_serve(library):
    """They were missed for ever: `two` has none for the layer `k`, which it leaves alone."""
    before = chosen(library, "two")
    router = centroids(library, before, "two")
    assert missing_descriptions(router, before) == []
    after = chosen(library, "two", "four", layers=("q", "k"), lacking=("two",))
    assert missing_descriptions(router, after) == ["four"]
    centroids(library, after, "four")
    router.prepare(after)
    assert router.for_layer("k")(torch.eye(IN)[None, :1], None).weight.tolist() == [[[0.0, 1.0]]]
    more = chosen(library, "two", layers=("q", "k"))
    assert missing_descriptions(router, more) == ["two"], "an expert that changes more is described again"
    with pytest.raises(ValueError, match="no centroid arrays of the expert 'two' and its layers"):
        router.prepare(more)


def test_centroids_of_another_base_are_described_again(library):
    one = replace(chosen(library, "two"), fingerprints={"q": "a base"})
    router = centroids(library, one, "two")
    assert missing_descriptions(router, one) == []
    assert missing_descriptions(router, replace(one, fingerprints={"q": "another"})) == ["two"]


# ---------------------------------------------------------------------- encoders


def by_length(texts):
    return torch.tensor([[len(text), 1.0] for text in texts])


def with_table(table):
    return lambda texts: table[[len(text) % 2 for text in texts]]


class Tables:
    def __init__(self, table):
        self.table = table


def test_encoders_are_told_apart_by_what_they_do():
    long = torch.zeros(5000, 2)
    other = long.clone()
    other[2500] = 1  # which printing leaves out
    module = torch.nn.Linear(2, 2)
    different = [
        by_length, lambda texts: by_length(texts) + 1, lambda texts: by_length(texts) + 2, with_table(long),
        with_table(other), Tables(long), Tables(other), HashingEncoder(8), HashingEncoder(16), module,
        torch.nn.Linear(2, 2), partial(by_length), partial(by_length, 1),
    ]  # fmt: skip
    names = [identity_of(encoder) for encoder in different]
    assert len(set(names)) == len(names)
    again = [identity_of(encoder) for encoder in different]
    assert names == again
    assert identity_of(with_table(long.clone())) == names[3]


def test_a_sentence_encoder_is_known_by_its_weights_and_stays_on_the_cpu(tmp_path):
    """Loaded while Lightning makes everything elsewhere, used under mixed precision."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "sort", "the", "letters", "sum"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip
    names, texts = [], ["sort the letters", "sum"]
    for seed in (0, 1):
        torch.manual_seed(seed)
        BertModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
        fast.save_pretrained(tmp_path)
        encoder = SentenceEncoder(str(tmp_path))
        with torch.device("meta"):
            names.append(identity_of(encoder))
            inside = encoder(texts)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = encoder(texts)
        plain = encoder(texts)
        assert plain.dtype == torch.float32
        assert torch.equal(inside, plain)
        assert torch.equal(mixed, plain)
    assert names[0] != names[1], "the folder's name is the same, its content is not"
    router = RetrievalRouter(encoder)
    assert router.description_settings()["encoder"] == names[1]
