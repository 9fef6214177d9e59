from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mball.server.run import running_server

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / ".demo" / "models"
HERE = Path(__file__).parent
TIMEOUT_S = 1800
_MAX_MODEL_LEN = 512
"""So that an answer without a bound of its own ends soon."""
_TEXT_TESTS = (
    "chat-basic-response",
    "chat-system-prompt",
    "chat-multi-turn",
    "chat-tool-calling",
    "chat-streaming-response",
    "chat-streaming-usage",
    "chat-error-handling",
)
"""Of llm-comply: not those of images and of reasoning, which the model does not have."""


def commands(venv: Path, url: str, model: str, results: Path) -> Iterator[tuple[str, str, list[str]]]:
    """A name, the file that must be there for it, and what to run."""
    python = str(venv / "bin" / "python")
    for client in ("anthropic", "litellm"):
        script = str(HERE / f"client_{client}.py")
        yield client, str(next(venv.glob(f"lib/python*/site-packages/{client}"), client)), [python, script, url, model]
    comply = str(venv / "bin" / "llm-comply")
    arguments = ["--format", "openai-chat", "--timeout", "600", "-f", ",".join(_TEXT_TESTS)]
    yield "llm-comply, openai-chat", comply, [comply, *arguments, "-u", f"{url}/v1", "-k", "none", "-m", model]
    lm_eval = str(venv / "bin" / "lm_eval")
    of_model = (
        f"model={model},base_url={url}/v1/chat/completions,num_concurrent=4,max_retries=1,tokenized_requests=False"
    )
    task = ["--tasks", "mball_local", "--include_path", str(HERE), "--apply_chat_template", "--limit", "4"]
    arguments = ["--model", "local-chat-completions", "--model_args", of_model, *task, "--output_path", str(results)]
    yield "lm-eval, local-chat-completions", lm_eval, [lm_eval, *arguments]


def taught(folder: Path, into: Path) -> Path:
    """The model in a folder beside it, with a chat template that has tools, which its own has not, and greedy: that the
    clients' requests end within the context is luck else."""
    into.mkdir()
    for path in folder.iterdir():
        (into / path.name).symlink_to(path)
    greedy = json.loads((folder / "generation_config.json").read_text()) | {"temperature": 0}
    for name, text in {
        "chat_template.jinja": (HERE / "tools.jinja").read_text(),
        "generation_config.json": json.dumps(greedy),
    }.items():
        (into / name).unlink()
        (into / name).write_text(text)
    return into


def main(venv: Path) -> int:
    subprocess.run([sys.executable, "-m", "mball", "models", "prepare-demo", str(MODELS)], check=True, timeout=900)
    failed = []
    with contextlib.ExitStack() as stack:
        results = stack.enter_context(tempfile.TemporaryDirectory())
        folder = taught(MODELS / "smollm2-135m", Path(results) / "smollm2-135m-tools")
        config = Path(results) / "config.yaml"
        config.write_text(json.dumps({"models": [{"path": str(folder), "max_model_len": _MAX_MODEL_LEN}]}))
        server = stack.enter_context(running_server(["--config", str(config)], log=Path(results) / "log"))
        for name, needed, command in commands(venv, server.url, folder.name, Path(results)):
            if not Path(needed).exists():
                sys.stdout.write(f"{name}: skipped, it is not installed\n")
                continue
            ran = subprocess.run(
                command,
                cwd=HERE,
                timeout=TIMEOUT_S,
                check=False,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            sys.stdout.write(f"{name}: {'passed' if ran.returncode == 0 else 'FAILED'}\n")
            if ran.returncode != 0:
                failed.append(name)
                sys.stdout.write(ran.stdout[-6000:] + "\n")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
