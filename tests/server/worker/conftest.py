"""Small tokenizers of the three kinds, a tiny model, and the worker's HTTP side over an engine without a model."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig

from mball.device.account import OpenAccount
from mball.memory.spec import WorkerSpec
from mball.server.engine import open_engine
from mball.server.engine.engine import GenerateEngine
from mball.server.worker.app import create_app
from mball.server.worker.process import _listen
from mball.server.worker.service import Service
from mball.server.worker.tokenizer import Tokenizer as WorkerTokenizer
from tests.server.worker.echo_engine import EchoEmbedder, EchoEngine, Script

CORPUS = [
    "The quick brown fox jumps over the lazy dog, twice.",
    "user and assistant and system: im_start, im_end, endoftext!",
    "Ünïcödé wörds, 日本語のテキスト, emoji 👩‍👩‍👧 and русский текст.\n\n  indented\tcode = {'a': [1, 2]}",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' </s>' }}"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system messages') }}"
    "{% else %}{{ '<|user|>\n' + m['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)


def byte_level(path: Path) -> Path:
    """As GPT-2, Llama 3 and Qwen: bytes, no unknown token, ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(path)
    return path


def metaspace(path: Path) -> Path:
    """As Llama 2 and Mistral: a space before the text, byte fallback, BOS; a role marker not flagged special."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The bytes are ordinary words of the vocabulary, not added tokens.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.add_tokens([AddedToken("<|user|>", special=False, normalized=False, rstrip=True)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = INST
    fast.save_pretrained(path)
    return path


def word_piece(path: Path) -> Path:
    """As BERT: lower case, [CLS] and [SEP] around, truncation and padding written into its file."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    fast.save_pretrained(path)
    return path


KINDS: dict[str, Callable[[Path], Path]] = {"byte_level": byte_level, "metaspace": metaspace, "word_piece": word_piece}


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = KINDS[kind](root / kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Callable[[str], Path]) -> WorkerTokenizer:
    return WorkerTokenizer(str(tokenizer_dir("byte_level")))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder: random weights and a real tokenizer."""
    path = byte_level(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


async def until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """For what can only be polled. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@dataclass
class Worker:
    """The HTTP side on a unix socket, in this process."""

    service: Service
    engine: EchoEngine
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI
    socket_path: str

    async def post(self, path: str, **body: object) -> httpx.Response:
        return await self.http.post(path, content=json.dumps({"model": "echo", **body}))

    async def refused(self, path: str, **body: object) -> dict[str, str | None]:
        """The error of a request that must get a 400."""
        answer = await self.post(path, **body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        return error


@contextlib.asynccontextmanager
async def http_side(service: Service, path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Serves on `path` until the end of the block."""
    listener = _listen(str(path))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, lifespan="off"))
    task = asyncio.create_task(server._serve([listener]))
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=60) as client:
            yield client
    finally:
        service.close()
        server.should_exit = True
        await task


MakeWorker = Callable[..., contextlib.AbstractAsyncContextManager[Worker]]


@pytest.fixture(scope="session")
def tiny_engine(tiny_model: Path) -> Iterator[GenerateEngine]:
    """Its steps take eight tokens each, so that every prompt is computed in pieces beside others' tokens."""
    spec = WorkerSpec("echo", str(tiny_model), "", device="cpu", threads=1, block_size=8, max_num_batched_tokens=8)
    engine = open_engine(spec, OpenAccount())
    assert isinstance(engine, GenerateEngine)
    engine.promote(None)
    yield engine
    engine.close()


@contextlib.asynccontextmanager
async def serving(engine: Any, tokenizer: WorkerTokenizer, path: Path) -> AsyncIterator[Worker]:
    """The HTTP side over an engine that is there already."""
    service = Service(WorkerSpec(model="echo", path="none", max_logprobs=5), engine, tokenizer)
    service.open_gate()
    async with http_side(service, path) as client:
        api = openai.AsyncOpenAI(base_url="http://worker/v1", api_key="none", http_client=client, max_retries=0)
        yield Worker(service, engine, client, api, str(path))


@contextlib.asynccontextmanager
async def echoing(
    tokenizer: WorkerTokenizer, path: Path, script: Script | None = None, step_s: float = 0.0
) -> AsyncIterator[Worker]:
    engine = EchoEngine(vocab_size=tokenizer.vocab_size, eos=2, script=script, step_s=step_s)
    engine.promote(None)
    try:
        async with serving(engine, tokenizer, path) as worker:
            yield worker
    finally:
        engine.close()


def taught_tokenizer(model: Path, folder: Path, template: str, special: Sequence[str] = ()) -> WorkerTokenizer:
    """A model's tokenizer with another chat template, saved in the folder; `special` tokens are added."""
    loaded = AutoTokenizer.from_pretrained(model)
    loaded.chat_template = template
    loaded.add_tokens(list(special), special_tokens=True)
    loaded.save_pretrained(folder)
    return WorkerTokenizer(str(folder))


@pytest.fixture
def make_worker(tokenizer: WorkerTokenizer, tmp_path: Path) -> MakeWorker:
    return functools.partial(echoing, tokenizer, tmp_path / "w.sock")


@pytest.fixture
async def worker(make_worker: MakeWorker) -> AsyncIterator[Worker]:
    async with make_worker() as worker:
        yield worker


@pytest.fixture
async def direct_worker(tokenizer: WorkerTokenizer) -> AsyncIterator[Worker]:
    """Without a socket: for requests that never reach the engine."""
    engine = EchoEngine(vocab_size=tokenizer.vocab_size, eos=2)
    service = Service(WorkerSpec(model="echo", path="none", max_logprobs=5), engine, tokenizer)
    service.open_gate()
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        api = openai.AsyncOpenAI(base_url="http://worker/v1", api_key="none", http_client=client, max_retries=0)
        yield Worker(service, engine, client, api, "")
    service.close()
    engine.close()


@pytest.fixture
async def embedding_worker(tokenizer_dir: Callable[[str], Path], tmp_path: Path) -> AsyncIterator[Worker]:
    tokenizer = WorkerTokenizer(str(tokenizer_dir("word_piece")))
    engine = EchoEmbedder(vocab_size=tokenizer.vocab_size)
    service = Service(WorkerSpec(model="echo", path="none", task="embed"), engine, tokenizer)
    service.open_gate()
    async with http_side(service, tmp_path / "e.sock") as client:
        api = openai.AsyncOpenAI(base_url="http://worker/v1", api_key="none", http_client=client, max_retries=0)
        yield Worker(service, engine, client, api, str(tmp_path / "e.sock"))  # type: ignore[arg-type]
