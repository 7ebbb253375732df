"""Report: the table that ``print(lk.patch(model))`` shows."""

from __future__ import annotations

from lora_kernels.reasons import Reason
from lora_kernels.report import FROZEN_UPCAST, FUSED, Report, collapse


def test_collapse_folds_layers_and_leaves():
    names = [f"model.layers.{i}.attn.{p}" for i in range(30) for p in ("q", "k", "v")]
    assert collapse(names) == [("model.layers.{0..29}.attn.{q,k,v}", 90)]


def test_collapse_keeps_different_sets_of_leaves_apart():
    names = ["h.0.q", "h.0.k", "h.1.q", "h.1.k", "h.2.q", "h.4.q"]
    assert collapse(names) == [("h.{0..1}.{q,k}", 4), ("h.{2,4}.q", 2)]


def test_collapse_folds_two_indices():
    names = [f"layers.{i}.experts.{j}.w1" for i in range(2) for j in (0, 1, 3)]
    assert collapse(names) == [("layers.{0..1}.experts.{0..1,3}.w1", 6)]


def test_collapse_does_not_invent_names():
    names = ["a.0.b.0.w", "a.1.b.1.w"]
    assert collapse(names) == [("a.0.b.0.w", 1), ("a.1.b.1.w", 1)]


def test_collapse_of_plain_names():
    assert collapse(["lm_head"]) == [("lm_head", 1)]
    assert collapse(["0", "1", "3"]) == [("{0..1,3}", 3)]
    assert collapse([]) == []


def test_table_is_aligned_and_grouped_by_reason():
    report = Report(
        fused=[(f"h.{i}.{p}", FUSED) for i in range(12) for p in ("q", "v")] + [("lm_head", FROZEN_UPCAST)],
        kept=[
            ("h.12.q", Reason.META),
            ("h.12.v", Reason.META),
            ("embed", "layer type not served: Embedding"),
        ],
    )
    assert str(report).splitlines() == [
        "24 of 27 LoRA layers fused, 1 frozen linear upcast",
        "  fused  24  lora_linear                       h.{0..11}.{q,v}",
        "  fused   1  frozen, upcast                    lm_head",
        "  kept    2  meta tensor                       h.12.{q,v}",
        "  kept    1  layer type not served: Embedding  embed",
    ]


def test_summary_without_lora_layers():
    report = Report(kept=[("lm_head", Reason.FAST_PRODUCT)])
    assert str(report).splitlines()[0] == "0 frozen linears swapped"
