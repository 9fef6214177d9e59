import io

from rich.console import Console

from mball.loader.progress import progress_bar
from mball.units import GiB


def test_the_bar_shows_bytes_and_rate() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress_bar("smollm2-135m", console) as progress:
        progress(GiB // 2, GiB)
        progress(GiB, GiB)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "smollm2-135m" in text
    assert "1.0 GiB of 1.0 GiB" in text
    assert "GiB/s" in text
