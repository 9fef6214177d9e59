import os
from pathlib import Path

import pytest

from mball.bench import pagecache
from mball.bench.baselines import _read
from mball.bench.contenders import Cannot

SIZE = 3_000_001


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_dropped_and_warm_again(file: Path) -> None:
    assert pagecache.resident_bytes(file) > SIZE / 2
    pagecache.drop([file])
    assert pagecache.resident_bytes(file) == 0
    pagecache.warm([file])
    assert pagecache.resident_bytes(file) == SIZE
    assert pagecache.resident_bytes(Path(os.devnull)) == 0


def test_pages_that_stay_are_seen() -> None:
    path = Path("/dev/shm") / f"mball-test-{os.getpid()}"
    path.write_bytes(bytes(10_000))
    try:
        with pytest.raises(Cannot, match="stay in the page cache"):
            pagecache.drop([path])
    finally:
        path.unlink()


def test_a_copy_is_whole_and_not_in_the_page_cache(file: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "folder").mkdir(parents=True)
    (tmp_path / "model" / "a.safetensors").write_bytes(file.read_bytes())
    copy = pagecache.copy_model(tmp_path / "model", tmp_path / "copy")
    assert [path.name for path in copy.iterdir()] == ["a.safetensors"]
    assert pagecache.resident_bytes(copy / "a.safetensors") == 0
    assert (copy / "a.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("flags", [0, os.O_DIRECT])
def test_raw_reads_read_it_all(file: Path, flags: int) -> None:
    result = _read([str(file), str(file)], flags, 1 << 20)
    assert result["bytes"] == 2 * SIZE
    assert result["first_s"] > 0
