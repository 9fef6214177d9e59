"""`mball bench`: measure this machine, MBALL and its peers."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mball.errors import ConfigError
from mball.units import GiB, format_bytes, parse_bytes

app = typer.Typer(help="Measure this machine, MBALL and its peers.", no_args_is_help=True)


@app.callback()
def _bench(context: typer.Context) -> None:
    # As Ctrl-C does: the servers that a benchmark has started end with it.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    context.call_on_close(lambda: signal.signal(signal.SIGTERM, before))


@app.command()
def load(
    model: Annotated[Path, typer.Argument(help="A model's folder, or one safetensors file.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    state: Annotated[str, typer.Option(help="Where the weights are before: warm, image, cold; by commas.")] = "warm",
    peers: Annotated[
        str,
        typer.Option(
            help="Whom to measure beside MBALL, by commas: safetensors, transformers, and on a GPU fastsafetensors, "
            "runai, instanttensor."
        ),
    ] = "safetensors,transformers",
    cores: Annotated[str, typer.Option(help="Run on these cores alone, as 0,1.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes per contender.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="MBALL's reader threads. Default: its choice.")] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="A contender whose first call takes so many seconds is called once.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a turn may take.")] = 900.0,
    verify: Annotated[bool, typer.Option("--verify", help="MBALL checks every byte against the manifest.")] = False,
    copies: Annotated[
        Path | None, typer.Option(help="Where the cold state's copies go, one a contender. Default: beside the model.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every round here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot here: PLOT.svg and PLOT.png.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table, machine and versions here.")] = None,
) -> None:
    """How fast weights come into memory, against others' loaders on the same files."""
    from mball.bench.load import Settings, run_load

    settings = Settings(
        device="cuda:0" if device == "cuda" else device,
        states=_words(state),
        peers=_words(peers),
        cores=_cores(cores),
        rounds=rounds,
        threads=threads,
        limit_s=limit,
        timeout_s=timeout,
        verify=verify,
        copies=copies,
    )
    run_load(model, settings, json_path=json, plot_path=plot, markdown_path=markdown, console=Console())


@app.command()
def tune(device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda") -> None:
    """Measure which threads and buffers load fastest to this GPU, and keep the choice for every later load here."""
    from mball.loader import tune as measure

    tuned = measure(device)
    table = Table("threads", "buffer", "GiB/s", "")
    for tried, rate in tuned.rates.items():
        chosen = "chosen" if tried == tuned.choice else ""
        table.add_row(str(tried.threads), format_bytes(tried.buffer_bytes), f"{rate / GiB:.1f}", chosen)
    Console().print(table if tuned.rates else "With few cores there is nothing to choose: the driver copies.")


@app.command()
def page(
    target: Annotated[Path, typer.Argument(help="The Markdown page to write.")],
    results: Annotated[list[Path], typer.Argument(help="JSON of `mball bench load`, in the order of the page.")],
) -> None:
    """One page of several results: what was wanted, what was reached, every table and plot."""
    from mball.bench import page as pages
    from mball.bench.report import from_json

    reports = [report for path in results for report in from_json(path.read_text())]
    drawn = pages.draw(reports, target.with_suffix(""), Console(stderr=True))
    target.write_text(pages.page(reports, drawn, target.parent))


@app.command()
def simulate(
    traces: Annotated[
        str, typer.Option(help="By commas: steady, bursty, shifting, heavy-tailed.")
    ] = "steady,bursty,shifting,heavy-tailed",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each contender on each trace.")] = 10,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests a second over all models, on average.")] = 0.3,
    minutes: Annotated[float, typer.Option(min=1, help="Virtual time of a run.")] = 75.0,
    tune: Annotated[bool, typer.Option("--tune", help="Tune every contender first (minutes).")] = False,
    json: Annotated[Path | None, typer.Option(help="Write every run here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot here: PLOT.svg and PLOT.png.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a page here, and its plot beside it.")] = None,
) -> None:
    """MBALL's policy against others' on one GPU with 24 models, over virtual time."""
    from mball.bench.simulate import Simulation, run_simulation

    simulation = Simulation(traces=_words(traces), seeds=seeds, rate=rate, minutes=minutes, tuning=tune)
    run_simulation(simulation, json_path=json, plot_path=plot, markdown_path=markdown, console=Console())


@app.command()
def allocator(
    model: Annotated[Path, typer.Argument(help="A model's folder: it is started several times at once, and switches.")],
    large: Annotated[Path, typer.Argument(help="A model whose worker is killed while its weights are on the device.")],
    share: Annotated[str, typer.Option(help="Of the device, for each of those started at once.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:N or simulated:PATH.")] = "cuda",
    kv: Annotated[str, typer.Option(help="Each model's KV pool.")] = "512MiB",
    dram: Annotated[str, typer.Option(help="For images.")] = "40GiB",
    kills: Annotated[int, typer.Option(min=1)] = 20,
    switches: Annotated[int, typer.Option(min=2)] = 20,
    vllm: Annotated[
        Path | None, typer.Option(help="A Python that has vLLM: as many of its servers are started at once, too.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything here, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
) -> None:
    """What the process allocator promises: no collisions, memory back at once, no switch that waits for a start."""
    from mball.bench.allocator import Options
    from mball.bench.allocator_report import run_allocator

    options = Options(
        model,
        large,
        device,
        share_bytes=parse_bytes(share),
        kv_bytes=parse_bytes(kv),
        dram_bytes=parse_bytes(dram),
        kills=kills,
        switches=switches,
    )
    if not run_allocator(options, vllm=vllm, json_path=json, markdown_path=markdown, console=Console()):
        raise typer.Exit(1)


@app.command()
def start(
    model: Annotated[Path, typer.Argument(help="A model's folder.")],
    vllm: Annotated[Path, typer.Option(help="A Python that has vLLM.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    kv: Annotated[str, typer.Option(help="The KV cache.")] = "1GiB",
    max_model_len: Annotated[int, typer.Option(min=64)] = 1024,
    eager: Annotated[bool, typer.Option("--eager", help="Compile and capture nothing.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each that count.")] = 3,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a start may take.")] = 900.0,
    json: Annotated[Path | None, typer.Option(help="Write every round here, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table, machine and versions here.")] = None,
) -> None:
    """vLLM from its process's start to the first token: stock, as a worker, and forked from a zygote, by stages."""
    from mball.bench.vllm_start import Options, run_start

    options = Options(model, vllm, device, parse_bytes(kv), max_model_len, eager, rounds, timeout)
    if not run_start(options, json_path=json, markdown_path=markdown, console=Console()):
        raise typer.Exit(1)


@app.command()
def switch(
    model: Annotated[Path, typer.Argument(help="A model's folder: it is served under two names.")],
    vllm: Annotated[
        Path | None, typer.Option(help="A Python that has vLLM: the engine, and the peer; the embedded one otherwise.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, simulated:PATH, or cuda:0+cuda:1.")] = "cuda",
    kv: Annotated[str, typer.Option(help="Each model's KV cache.")] = "2GiB",
    dram: Annotated[str, typer.Option(help="For images.")] = "40GiB",
    room: Annotated[
        str | None, typer.Option(help="Of the device, for MBALL: for one model, and for what a sleeping one holds.")
    ] = None,
    max_model_len: Annotated[int, typer.Option(min=64)] = 1024,
    eager: Annotated[bool, typer.Option("--eager", help="vLLM compiles and captures nothing.")] = False,
    switches: Annotated[int, typer.Option(min=2)] = 50,
    batches: Annotated[str, typer.Option(help="Requests at once for tokens/s, by commas.")] = "1,32",
    tokens: Annotated[int, typer.Option(min=16, help="Of each of those.")] = 256,
    together: Annotated[bool, typer.Option(help="Start both at once before, with room for both.")] = True,
    peer: Annotated[bool, typer.Option(help="vLLM's own servers beside it, put to sleep by hand.")] = True,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a start may take.")] = 900.0,
    json: Annotated[Path | None, typer.Option(help="Write every round here, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table, machine and versions here.")] = None,
) -> None:
    """Two models take turns on memory for one, under `mball serve` and by hand: from the request to the first token."""
    from mball.bench.switch import Options, run_switch

    options = Options(
        model,
        vllm,
        device,
        parse_bytes(kv),
        parse_bytes(dram),
        None if room is None else parse_bytes(room),
        max_model_len,
        eager,
        switches,
        tuple(int(word) for word in _words(batches)),
        tokens,
        together,
        peer,
        timeout,
    )
    if not run_switch(options, json_path=json, markdown_path=markdown, console=Console()):
        raise typer.Exit(1)


@app.command()
def layers(
    model: Annotated[Path, typer.Argument(help="The folder of a model that generates.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    share: Annotated[float, typer.Option(help="Of the layers, how many are streamed.")] = 0.5,
    source: Annotated[str, typer.Option(help="Where they come from: image (DRAM) or disk.")] = "image",
    steps: Annotated[int, typer.Option(min=1, help="Tokens a measurement.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes per contender.")] = 2,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds a measurement may take.")] = 15.0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a turn may take.")] = 300.0,
    peers: Annotated[str, typer.Option(help="Whom to measure beside MBALL, by commas: accelerate.")] = "accelerate",
    vllm: Annotated[
        Path | None, typer.Option(help="A Python that has vLLM: it offloads the same share of its layers, too.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every round here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot here: PLOT.svg and PLOT.png.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table, machine and versions here.")] = None,
) -> None:
    """A model with a part of its layers streamed, against what computing and the bus or the disk allow, and against
    accelerate and vLLM."""
    from mball.bench.layers import Settings, run_layers

    settings = Settings(device, share, source, steps, rounds, limit, timeout, _words(peers), vllm)
    run_layers(model, settings, json_path=json, plot_path=plot, markdown_path=markdown, console=Console())


@app.command()
def swap(
    store: Annotated[bool, typer.Option("--store", help="The store against the raw disk at its best depth.")] = False,
    folder: Annotated[Path, typer.Option(help="A folder on the disk to measure.")] = Path(),
    size: Annotated[str, typer.Option(help="Bytes that are written and read; the disk needs twice that.")] = "2GiB",
    slot: Annotated[str, typer.Option(help="Bytes of a slot.")] = "2MiB",
    depths: Annotated[str, typer.Option(help="Raw calls in flight, by commas.")] = "1,2,4,8,16",
    threads: Annotated[int, typer.Option(min=2, help="The store's threads.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes per contender.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write every round here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot here: PLOT.svg and PLOT.png.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table, machine and versions here.")] = None,
) -> None:
    """What swapping to a disk costs, against what the disk can do."""
    from mball.bench.swap_store import Settings, run_store

    if not store:
        raise ConfigError("say what to measure: --store")
    settings = Settings(folder, _size(size), _size(slot), _numbers("--depths", depths), threads, rounds)
    run_store(settings, json_path=json, plot_path=plot, markdown_path=markdown, console=Console())


@app.command()
def kv(
    model: Annotated[Path, typer.Argument(help="The folder of a model that generates.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    tokens: Annotated[int, typer.Option(min=64, help="Of the prompt whose KV is brought back.")] = 8000,
    store: Annotated[
        list[Path] | None, typer.Option(help="A folder for a store; may be given again. Without: from DRAM alone.")
    ] = None,
    disk_rate: Annotated[
        str, typer.Option(help="One more store, in the first folder, that reads so much a second, as 1.1GiB.")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each kind in a process.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes per contender.")] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a turn may take.")] = 900.0,
    json: Annotated[Path | None, typer.Option(help="Write every round here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot here: PLOT.svg and PLOT.png.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table, machine and versions here.")] = None,
) -> None:
    """The first token of a prompt whose KV comes back from DRAM or a store, against computing it; and the gate."""
    from mball.bench.kv import Settings, run_kv

    rate = float(_size(disk_rate)) if disk_rate else None
    settings = Settings(device, tokens, tuple(store or ()), rate, repeats, rounds, timeout)
    run_kv(model, settings, json_path=json, plot_path=plot, markdown_path=markdown, console=Console())


@app.command()
def gateway(
    litellm: Annotated[
        bool, typer.Option(help="Measure the LiteLLM proxy beside it, which pip installs into a venv of its own.")
    ] = True,
    venv: Annotated[Path, typer.Option(help="The folder of that venv, made where it is not.")] = Path(
        "~/.cache/mball/bench-litellm"
    ),
    seconds: Annotated[float, typer.Option(help="Of each rate and window.")] = 4.0,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the added latency.")] = 5,
    rate: Annotated[float, typer.Option(help="Requests a second in a window.")] = 200.0,
    streams: Annotated[int, typer.Option(min=0, help="Open at once, for their memory.")] = 1000,
    growth: Annotated[int, typer.Option(min=0, help="Requests over which memory may grow.")] = 20_000,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes per contender.")] = 3,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a turn may take.")] = 900.0,
    json: Annotated[Path | None, typer.Option(help="Write every round here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot here: PLOT.svg and PLOT.png.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table, machine and versions here.")] = None,
) -> None:
    """What the gateway costs a request, beside the LiteLLM proxy and a worker called directly."""
    from mball.bench.gateway import Settings, run_gateway

    peer = venv.expanduser() if litellm else None
    settings = Settings(peer, seconds, windows, rate, streams, growth, rounds, timeout)
    run_gateway(settings, json_path=json, plot_path=plot, markdown_path=markdown, console=Console())


@app.command()
def chaos(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Models' folders, in float32. Default: three small random ones.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests, at least.")] = 5000,
    swaps: Annotated[int, typer.Option(min=1, help="Swaps, at least.")] = 500,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 8,
    kill: Annotated[float, typer.Option(min=0.05, help="Seconds between two faults, on average.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the counts here, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
) -> None:
    """Kill and hang workers at every step while clients ask for more models than fit; fail where a promise breaks."""
    from mball.bench.chaos_run import run_chaos

    held = run_chaos(
        models or [],
        requests=requests,
        swaps=swaps,
        clients=clients,
        kill_s=kill,
        seed=seed,
        json_path=json,
        markdown_path=markdown,
        console=Console(),
    )
    if not held:
        raise typer.Exit(1)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _cores(text: str) -> tuple[int, ...]:
    return _numbers("--cores", text)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise ConfigError(f"{option}: numbers by commas, not {text!r}") from None


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None
