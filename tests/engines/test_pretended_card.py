"""The pretended card's own rules: each sees an error that is planted here."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.support.card import WORKSPACE, Card, Mixed, installed

GPU = torch.device("cuda")


@pytest.fixture
def card() -> Iterator[Card]:
    with installed(Card()) as card, torch.inference_mode():
        yield card


@pytest.mark.parametrize(
    ("waits", "launches", "what"),
    [
        (1, 1, lambda x: float(x.sum())),
        (1, 2, lambda x: bool((x > 0).any())),
        (1, 1, lambda x: x.sum().item()),
        (1, 2, lambda x: x[x > 0]),
        (1, 1, lambda x: torch.linalg.svdvals(x)),
        (1, 1, lambda x: torch.linalg.qr(x)),
        (0, 1, lambda x: torch.linalg.cholesky_ex(x)),
        (0, 1, lambda x: x.repeat_interleave(3, 1)),
        (0, 0, lambda x: x.view(-1)[3:].split(2)),
        (0, 1, lambda x: x.add_(1)),
        (0, 0, lambda x: torch.empty_like(x)),
        (0, 1, lambda x: torch.zeros(3, device=GPU)),
        (1, 0, lambda x: torch.tensor([1, 2], device=GPU)),
        (1, 0, lambda x: torch.ones(3).to(GPU)),
        (1, 0, lambda x: torch.ones(3).to(GPU, non_blocking=True)),
        (0, 0, lambda x: torch.ones(3).pin_memory().to(GPU, non_blocking=True)),
        (1, 0, lambda x: x.cpu()),
        (0, 0, lambda x: x.to("cpu", non_blocking=True)),
        (1, 0, lambda x: torch.empty(4, 4).copy_(x, non_blocking=True)),
        (0, 0, lambda x: torch.empty(4, 4).pin_memory().copy_(x, non_blocking=True)),
    ],
)
def test_waits_and_launches_are_counted(
    waits: int, launches: int, what: Callable[[Tensor], object], card: Card
):
    x = torch.eye(4).to(GPU)
    card.waits = card.launches = 0
    what(x)
    assert (card.waits, card.launches) == (waits, launches)


def test_transfers_are_counted(card: Card):
    torch.ones(3).to(GPU).cpu()
    assert card.transfers == 2


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ("both|and of the CPU", lambda x: x + torch.ones(4)),
        ("process's generator", lambda x: torch.rand(3, device=GPU)),
        ("process's generator", lambda x: x.uniform_()),
        ("only stores float8", lambda x: x.to(torch.float8_e4m3fn) * 2),
        ("no such product", lambda x: x.int() @ x.int()),
    ],
)
def test_operations_that_cuda_lacks_are_refused(
    message: str, what: Callable[[Tensor], object], card: Card
):
    with pytest.raises(Mixed, match=message):
        what(torch.eye(4).to(GPU))


def test_float8_is_stored(card: Card):
    x = torch.eye(4).to(GPU).to(torch.float8_e4m3fn)
    assert torch.equal(x[:2].clone().view(torch.uint8).cpu(), x.cpu().view(torch.uint8)[:2])


def test_zeros_have_no_eigenvalues(card: Card):
    with pytest.raises(RuntimeError, match="zeros"):
        torch.linalg.eigh(torch.zeros(3, 3, device=GPU))


def test_tf32_is_seen(card: Card):
    x = torch.full((4, 4), 1 + 2.0**-20).to(GPU)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert float((x @ x)[0, 0]) == 4
        torch.set_float32_matmul_precision("highest")
        assert float((x @ x)[0, 0]) != 4
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_sum_of_a_product_is_not_in_lower_precision(card: Card):
    x, before = torch.full((4, 4), 1 + 2.0**-20).to(GPU), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert float(x.clone().addmm_(x, x)[0, 0]) == 5 + 2.0**-20 * 1
    finally:
        torch.set_float32_matmul_precision(before)


def test_indices_are_sorted_in_deterministic_mode(card: Card):
    x, rows = torch.zeros(64, 64).to(GPU), torch.arange(64).to(GPU)
    x[rows] = torch.ones(64, 64, device=GPU)
    before, most = card.most_reserved, 32 * 64 * 64
    torch.use_deterministic_algorithms(True)
    try:
        x[rows] = torch.ones(64, 64, device=GPU)
    finally:
        torch.use_deterministic_algorithms(False)
    assert card.most_reserved - before >= most // 2


def test_freed_memory_serves_its_own_stream(card: Card):
    card.workspace = 0
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            del_me = torch.empty(1 << 10, dtype=torch.uint8, device=GPU)
            del del_me
    assert card.reserved == 3 << 10
    for _ in range(3):
        del_me = torch.empty(1 << 10, dtype=torch.uint8, device=GPU)
        del del_me
    assert card.most_reserved == 4 << 10


def test_a_full_card_takes_freed_memory_back_and_then_ends():
    with installed(Card(memory=4 << 10)) as card:
        with torch.cuda.stream(torch.cuda.Stream()):
            first = torch.empty(3 << 10, dtype=torch.uint8, device=GPU)
        del first
        card.waits = 0
        second = torch.empty(2 << 10, dtype=torch.uint8, device=GPU)
        assert card.waits == 1
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(3 << 10, dtype=torch.uint8, device=GPU)
        del second
        torch.empty(3 << 10, dtype=torch.uint8, device=GPU)


def test_products_take_a_workspace_in_each_stream(card: Card):
    x = torch.eye(4).to(GPU)
    before = card.reserved
    x @ x
    x @ x
    assert card.reserved - before == WORKSPACE + 512
    card.memory = card.reserved + (1 << 20)
    torch.cuda.synchronize()
    with (
        torch.cuda.stream(torch.cuda.Stream()),
        pytest.raises(RuntimeError, match="CUBLAS_STATUS_NOT_INITIALIZED"),
    ):
        x @ x


def test_pinned_memory_is_of_powers_of_two(card: Card):
    torch.empty(5000, dtype=torch.uint8, pin_memory=True)
    assert (card.pinned_buffers, card.pinned_bytes) == (1, 8192)


def test_the_33rd_stream_is_the_first(card: Card):
    made = [torch.cuda.Stream() for _ in range(33)]
    assert len({stream.number for stream in made}) == 32


def test_an_event_is_over_when_it_was_waited_for(card: Card):
    event = torch.cuda.Event()
    torch.ones(3).pin_memory().to(GPU, non_blocking=True)
    event.record()
    assert not event.query()
    event.synchronize()
    assert event.query()


def test_a_card_without_kernels_fails_at_every_operation():
    with installed(Card(fails="CUDA error: no kernel image is available")):
        assert torch.cuda.is_available()
        with pytest.raises(RuntimeError, match="no kernel image"):
            torch.zeros(3, device=GPU).add_(1)
        with pytest.raises(RuntimeError, match="no kernel image"):
            torch.cuda.mem_get_info()


def test_tensors_of_two_cards_do_not_meet():
    with installed(Card(count=2)) as card, torch.inference_mode():
        card.taken[0] = 1 << 30
        free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
        assert free[1] - free[0] == 1 << 30
        x, y = torch.ones(3).to("cuda:0"), torch.ones(3).to("cuda:1")
        assert (x.device.index, (y + y).device.index) == (0, 1)
        with torch.cuda.stream(torch.cuda.Stream("cuda:1")):
            assert torch.ones(3).to("cuda").device.index == 1
        with pytest.raises(Mixed, match="two cards"):
            x + y
        assert torch.equal(x.to("cuda:1").cpu(), x.cpu())
