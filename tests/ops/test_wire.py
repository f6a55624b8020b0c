"""The wire format: where sections lie, what an entry costs, the header, and messages for status codes."""

import pytest
import torch

from dgc.ops import wire, wire_layout


def layout(rows, dtype=torch.float32):
    return wire_layout(torch.tensor([[0, 0, 0, numel, k] for numel, k in rows]), dtype)


def test_sections_follow_each_other_at_multiples_of_sixteen():
    at = layout([(70_000, 70), (300, 3)])
    assert at == wire.WireLayout(used=32, ends=48, indices=64, values=64 + 160, nbytes=64 + 160 + 304)


@pytest.mark.parametrize(
    ("dtype", "nbytes_an_entry"), [(torch.float32, 6.06), (torch.float16, 4.06), (torch.bfloat16, 4.06)]
)
def test_an_entry_costs_what_the_paper_counts_and_a_tile_table(dtype, nbytes_an_entry):
    # 0.1 % of 25M elements: 48 or 32 bits an entry, and 4 bytes for each of 382 tiles.
    assert layout([(25_000_000, 25_000)], dtype).nbytes / 25_000 == pytest.approx(nbytes_an_entry, abs=0.01)


def test_the_header_is_what_was_stamped():
    payload = torch.zeros(64, dtype=torch.uint8)
    wire.stamp(payload, fingerprint=2**55 + 1).fill_(2**40 + 3)
    assert wire.header(payload).tolist() == [wire.MAGIC, 2**40 + 3, 2**55 + 1, 0]
    assert bytes(payload[:8].tolist()) == b"DGCWIRE2"


@pytest.mark.parametrize("code", sorted(wire.STATUS))
def test_every_status_code_has_a_message_that_names_the_rank(code):
    payloads = torch.zeros(3, 64, dtype=torch.uint8)
    with pytest.raises(wire.PayloadError, match="payload of rank 2: ") as error:
        wire.check_status([0, 0, code], payloads)
    assert wire.STATUS[code] in str(error.value)


def test_ranks_with_non_finite_gradients_are_returned():
    payloads = torch.zeros(3, 64, dtype=torch.uint8)
    assert wire.check_status([256, 0, 256], payloads) == [0, 2]


@pytest.mark.parametrize(
    ("parameters", "one_dimensional", "papers_ratio"),
    [(25_557_032, 54_120, 277), (60_965_224, 10_568, 597), (51_034_000, 34_000, 462)],
    ids=["ResNet-50", "AlexNet", "PTB LSTM"],
)
def test_the_payload_reaches_the_papers_ratios_less_the_tile_table(parameters, one_dimensional, papers_ratio):
    numel = parameters - one_dimensional
    sent = layout([(numel, -(-numel // 1000))]).nbytes + 4 * one_dimensional
    assert 0.985 * papers_ratio < 4 * parameters / sent < papers_ratio + 1
