import pytest
import torch

from mball.errors import DeviceError, DeviceOutOfMemory
from mball.loader.probe import tune
from mball.loader.slab import HostSlab, open_slab
from mball.units import MiB
from tests.loader.files import mapping_of


class Ledger:
    """An account with a limit."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.taken_bytes = 0

    def take(self, nbytes: int) -> None:
        if self.taken_bytes + nbytes > self.total_bytes:
            raise DeviceOutOfMemory("test", nbytes, self.total_bytes - self.taken_bytes, self.total_bytes)
        self.taken_bytes += nbytes

    def give(self, nbytes: int) -> None:
        self.taken_bytes -= nbytes


def test_addresses_cost_no_memory_and_outlive_a_release() -> None:
    slab = HostSlab(64 * MiB)
    view = slab.view(4 * MiB, (1024, 1024), torch.float32)
    address = view.data_ptr()
    assert mapping_of(address)[1]["Rss"] == 0
    for value in (1.0, 2.0):
        slab.populate()
        view.fill_(value)
        path, fields = mapping_of(address)
        assert path == ""
        assert fields["Anonymous"] >= 4 * MiB
        assert slab.release() == 64 * MiB
        assert mapping_of(address)[1]["Rss"] == 0
        assert view.data_ptr() == address
        assert view.sum() == 0


def test_views_share_the_slab_and_stay_inside_it() -> None:
    slab = HostSlab(1024)
    slab.populate()
    slab.view(0, (256,), torch.float32).fill_(1.0)
    assert slab.view(512, (), torch.float32) == 1.0
    assert slab.view(1024, (0, 5), torch.float32).shape == (0, 5)
    for offset, shape in ((1024, ()), (512, (129,)), (-4, (1,))):
        with pytest.raises(ValueError, match="of a slab of 1024"):
            slab.view(offset, shape, torch.float32)


def test_tensors_outlive_the_slab() -> None:
    slab = HostSlab(MiB)
    slab.populate()
    view = slab.view(0, (10,), torch.int64)
    view.copy_(torch.arange(10))
    del slab
    assert view.tolist() == list(range(10))


def test_what_is_taken_is_given_back_once() -> None:
    ledger = Ledger(100)
    slab = HostSlab(60, ledger)
    assert ledger.taken_bytes == 0
    slab.populate()
    slab.populate()
    assert ledger.taken_bytes == 60
    with pytest.raises(DeviceOutOfMemory):
        HostSlab(60, ledger).populate()
    assert (slab.release(), slab.release()) == (60, 0)
    assert ledger.taken_bytes == 0
    slab.populate()
    slab.close()
    assert ledger.taken_bytes == 0


def test_an_empty_slab() -> None:
    slab = open_slab(0, torch.device("cpu"))
    slab.populate()
    assert slab.view(0, (0,), torch.bfloat16).numel() == 0
    assert slab.release() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceError, match=r"cuda:3: torch .* finds no GPU"):
        open_slab(1, torch.device("cuda:3"))
    with pytest.raises(DeviceError, match="finds no GPU"):
        tune()
