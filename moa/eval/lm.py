"""A model under a plan as lm-eval sees it: lm-eval's Hugging Face class, with the plan applied.

What it adds to `HFLM`: a plan; the requests that were cut are counted; several processes share the work on CPUs too;
logits are made for the scored tokens alone, not for a whole long context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from moa import demo, distributed
from moa.errors import UsageError
from moa.eval.compressed import Answering, Prefill
from moa.hf.apply import Attachment, apply
from moa.hf.shape import fingerprint, unwrapped
from moa.local_paths import public_name
from moa.plan import Plan, load_plan

Request = tuple[tuple[str, str], list[int], list[int]]


class MoaLM(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """`--model moa --model_args pretrained=DIR,plan=PLAN`: every argument of `HFLM` as well.

    Args:
        pretrained: model folder, hub id, "demo", or a loaded model.
        plan: file, folder or hub id of a plan, or a plan; dense when None.
        plan_backend: as `backend` in `moa.apply`; lm-eval has an argument of that name.
        allow_other_weights: as in `moa.apply`.
        prefill_chunk: tokens of a prompt that generation computes at a time, with a plan or without; bounds its memory.
        device: where there is a GPU the first one, else the CPU, when None.
        kwargs: of `HFLM`. With `batch_size="auto"` a GPU gets the largest batch that fits, up to `max_batch_size`; a CPU one
            text at a time unless that is given, for the system kills what takes too much of its memory.

    Raises:
        PlanError, HubError, ModelError, UsageError: as `moa.apply`.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        plan: str | Plan | None = None,
        plan_backend: str = "torch",
        allow_other_weights: bool = False,
        prefill_chunk: int | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if prefill_chunk is not None and (type(prefill_chunk) is not int or prefill_chunk < 1):
            raise UsageError(f"prefill_chunk must be a whole number of at least 1, got {prefill_chunk!r}")
        self.prefill_chunk = prefill_chunk
        self._attachment: Attachment | None = None
        self._prefill: Prefill | None = None
        self._tail: int | None = None
        self._cut: set[str] = set()
        name = demo.resolve(pretrained) if isinstance(pretrained, str) else pretrained
        super().__init__(name, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **kwargs)
        if self.device.type == "cpu" and "max_batch_size" not in kwargs:
            self.max_batch_size = 1
        self._share_work()
        if plan is not None:
            self.attach(plan, plan_backend, allow_other_weights=allow_other_weights)

    def attach(self, plan: str | Plan, backend: str = "torch", *, allow_other_weights: bool = False) -> Attachment:
        """Run the model under a plan from now on; see `moa.apply`. Leaving the result's `with` block ends it."""
        plan = plan if isinstance(plan, Plan) else load_plan(plan)
        self._attachment = apply(self.model, plan, backend=backend, allow_other_weights=allow_other_weights)
        return self._attachment

    @contextmanager
    def compressing(self, prefill: Prefill) -> Iterator[None]:
        """Answer from compressed prompts for a while, one text at a time; see `moa.eval.compressed`."""
        self._prefill = prefill
        try:
            yield
        finally:
            self._prefill = None

    def set_max_length(self, n_tokens: int) -> None:
        """Room for prompt and answer from now on; also the window of rolling likelihoods."""
        self._max_length = n_tokens

    @property
    def plan(self) -> Plan | None:
        """The plan that is at work now."""
        attached = self._attachment
        return attached.plan if attached is not None and "moa" in vars(self._core) else None

    @property
    def attention(self) -> str:
        """What computes attention now: a backend of ours, or transformers' own."""
        if self.plan is not None and self._attachment is not None:
            return self._attachment.backend
        return str(self._core.config._attn_implementation)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes about the model into its results, and ours under "moa"."""
        plan = self.plan
        ours = {
            "version": version("moa"),
            "model_fingerprint": fingerprint(self._core),
            "model_commit": getattr(self._core.config, "_commit_hash", None),
            "device": str(self.device),  # lm-eval writes down the one that it was asked for
            "attention": self.attention,
            "plan_sha256": plan.sha256 if plan else None,
            "plan_model": public_name(plan.model.name) if plan else None,
            "length_mode": plan.length_mode if plan else None,
            "density_ratio": {str(at.length_tokens): at.density_ratio for at in plan.lengths} if plan else None,
            "max_length": self.max_length,
            "prefill_chunk": self.prefill_chunk,
            "truncated_requests": len(self._cut),
        }
        return {**super().get_model_info(), "moa": ours}

    def was_cut(self, request: Sequence[Any]) -> bool:
        """Whether the model saw less than all of a request, given as lm-eval logs it: a context and what follows."""
        return _key(request) in self._cut

    def forget_cuts(self) -> None:
        """Count cut requests anew."""
        self._cut = set()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's; counts requests whose context is cut."""
        texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._share_cuts()
        return texts

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's; counts requests whose context is cut."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._share_cuts()
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's.

        Raises:
            UsageError: prompts are compressed, and here there is none.
        """
        if self._prefill is not None:
            raise UsageError(
                "rolling likelihoods have no prompt that could be compressed; leave the task out, or the baseline"
            )
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return found

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As lm-eval's: ids and mask int64 [B, T]; notes the rows that lose tokens."""
        if left_truncate_len is not None:
            self._note_cuts(strings, left_truncate_len)
        encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        return encoded

    def _note_cuts(self, strings: Sequence[str], room_tokens: int) -> None:
        """Remember contexts that are longer than the room there is."""
        for text in strings:
            if len(self.tok_encode(text)) > room_tokens:
                self._cut.add(_key((text,)))

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for texts, context, continuation in requests:
            if texts is not None and len(context) + len(continuation) > self.max_length + 1:
                self._cut.add(_key(texts))
        if self._prefill is not None:
            return [self._compressed_likelihood(self._prefill, *request) for request in requests]
        with self._scoring(_tail_tokens(requests, self.max_length)):
            scored: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return scored

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, K, V] of the last K positions, those that `_loglikelihood_tokens` scores; of all of them elsewhere.

        HFLM finds its rows by their distance from the end, so fewer logits need no other care.
        """
        if self._tail is None or labels is not None or "logits_to_keep" not in signature(self._core.forward).parameters:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        with torch.no_grad(), self._mixed():
            kept: Tensor = self.model(inps, use_cache=False, logits_to_keep=min(self._tail, inps.shape[1])).logits
        return kept

    def _compressed_likelihood(
        self, prefill: Prefill, texts: tuple[str, str], context: list[int], continuation: list[int]
    ) -> tuple[float, bool]:
        """Log-likelihood of a continuation after a compressed prompt, and whether greedy decoding writes it."""
        prompt = (context + continuation)[-(self.max_length + 1) : -len(continuation)]
        if not prompt:
            raise UsageError(f"a continuation of {len(continuation)} tokens leaves no room for a prompt to compress")
        with self._mixed():
            logits = Answering(self._core, prefill, prompt).logits(continuation)  # [K, V]
        scores = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        wanted = torch.tensor(continuation, device=scores.device)
        answer = float(scores.gather(1, wanted[:, None]).sum()), bool((scores.argmax(-1) == wanted).all())
        self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answer

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Ids int64 [B, T + new] of prompts and answers, as HFLM's; from compressed prompts row by row, greedily.

        Raises:
            UsageError: prompts are compressed, and greedy decoding is not what is asked for.
        """
        prefill, given = self._prefill, generation_kwargs
        if prefill is None:
            chunk = {} if self.prefill_chunk is None else {"prefill_chunk_size": self.prefill_chunk}
            whole: Tensor = super()._model_generate(context, max_length, stop, **chunk, **generation_kwargs)
            return whole
        if given.get("do_sample") or given.get("num_beams", 1) != 1:
            raise UsageError("compressed prompts are answered greedily; the task asks for samples or beams")
        mask = given.get("attention_mask", torch.ones_like(context)).bool()
        room = max_length - context.shape[1]
        answers = [
            self._compressed_answer(prefill, row[m].tolist(), room, stop) for row, m in zip(context, mask, strict=True)
        ]
        padded = pad_sequence(answers, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return torch.cat([context, padded.to(context)], dim=1)

    def _compressed_answer(self, prefill: Prefill, prompt: list[int], max_tokens: int, stop: list[str]) -> Tensor:
        """Token ids of a greedy answer, int64 [new]."""
        ends = self._core.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]

        def done(answer: Sequence[int]) -> bool:
            written = self.tok_decode(list(answer), skip_special_tokens=False)
            return answer[-1] in ends or any(sequence in written for sequence in stop)

        with self._mixed():
            return torch.tensor(Answering(self._core, prefill, prompt).greedy(max_tokens, done), dtype=torch.long)

    def _mixed(self) -> torch.autocast:
        mixed = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None)

    @contextmanager
    def _scoring(self, tail_tokens: int) -> Iterator[None]:
        before, self._tail = self._tail, tail_tokens
        try:
            yield
        finally:
            self._tail = before

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """As lm-eval's, by trying; but for a size that needs no trial, which takes five forward calls."""
        return 1 if self.max_batch_size == 1 else int(super()._detect_batch_size(requests, pos))

    def _share_work(self) -> None:
        """Take a share of the samples where a launcher has started several processes.

        HFLM does so for several GPUs of one machine and for models that it loads; elsewhere every process would do the
        whole task. Tensor parallelism, where all work on the same samples, has no accelerator.
        """
        if not isinstance(self.pretrained, str) and distributed.environment()[1] > 1:
            self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _share_cuts(self) -> None:
        """Let every process know what any of them cut; all come here after each kind of request."""
        if self.world_size > 1:
            everyones: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(everyones, self._cut)
            self._cut = set().union(*everyones)

    @property
    def _core(self) -> PreTrainedModel:
        """The transformers model itself, inside a PEFT wrapper too."""
        return unwrapped(self.model)


def _key(request: Sequence[Any]) -> str:
    """A request's name: its context, and its continuation where it has one; generation arguments do not count."""
    texts = [part for part in request if isinstance(part, str)]
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()


def _tail_tokens(requests: Sequence[Request], max_length: int) -> int:
    """How many of a batch's last positions hold all that is scored, whichever requests lm-eval puts into it.

    Rows are padded on the right to the longest of their batch, so a scored token lies at most the longest continuation
    and the greatest difference of lengths from the end.
    """
    lengths = [min(len(context) + len(continuation) - 1, max_length) for _, context, continuation in requests]
    return max(len(continuation) for _, _, continuation in requests) + max(lengths) - min(lengths)
