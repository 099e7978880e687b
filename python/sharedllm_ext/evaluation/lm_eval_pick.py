"""lm-eval over a model with a pick: of a task's prompt the last part is the question, the rest the text that is read.

Needs the package ``lm-eval``; importing this module registers the model type ``sharedllm-pick`` there.
"""

import copy
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import Tensor

_TEMPLATE = (
    "apply_chat_template: expected False for a model with a pick, whose config.passage_prompt stands in the place of a "
    "chat template, got True"
)


@register_model("sharedllm-pick")
class PickLM(HFLM):  # type: ignore[misc]
    """lm-eval's ``hf`` whose prompts are compressed, all but the question, which passages are found for.

    Args:
        pretrained: a model with a pick and a ``passage_prompt``, or the folder of one.
        passages: how many are found and read.
        separator: the question is what follows its last occurrence in a prompt, white space at the end aside; a prompt
            without one is all question. Answers that a task begins (``gen_prefix``) are part of it.
        kwargs: as for ``HFLM``; ``max_length`` and ``truncation`` are not used, since nothing is cut.

    Raises:
        ValueError: a model without a pick.
    """

    def __init__(self, pretrained: Any, *, passages: int = 8, separator: str = "\n", **kwargs: Any) -> None:
        super().__init__(pretrained, **kwargs)
        model = self.model
        if getattr(model, "pick", None) is None or model.config.passage_prompt is None:
            raise ValueError("pretrained: expected a model with a pick and a passage_prompt, got one without")
        if not separator:
            raise ValueError("separator: expected text, got an empty one")
        self._count, self._separator = int(passages), separator
        # requests about one text come one after the other
        self._read: tuple[str, Tensor, Any] | None = None

    def _encode(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return torch.tensor([ids], dtype=torch.int64, device=self.device)

    def _split(self, prompt: str) -> tuple[str, str]:
        """Text and question of a prompt."""
        whole = prompt.rstrip()
        text, _, question = whole.rpartition(self._separator)
        if not question.strip():
            raise ValueError(f"prompt: expected a question at its end, got {prompt[-40:]!r}")
        return text, question.strip()

    def _request(self, prompt: str) -> tuple[Tensor, dict[str, Any]]:
        """The question's tokens ``[1, L]``, and the keywords of ``generate`` that read the text."""
        text, question = self._split(prompt)
        if self._read is None or self._read[0] != text:
            # freed before the next one is made
            self._read = None
            context = self._encode(text)
            self._read = text, context, self.model.compress(context, training=False)
        _, context, memory = self._read
        ids = self._encode(question)
        how = {"context_ids": context, "memory": memory, "passages": self._count, "tokenizer": self.tokenizer}
        return ids, {**how, "attention_mask": torch.ones_like(ids)}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """One answer for each request, up to its first stop sequence."""
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        answers = []
        for prompt, options in (request.args for request in requests):
            kwargs = normalize_gen_kwargs(options, self.max_gen_toks)
            # a copy: it is appended to
            stops = handle_stop_sequences(copy.copy(kwargs.pop("until", None)), eos=end)
            ids, how = self._request(prompt)
            length = ids.shape[1] + kwargs.pop("max_gen_toks")
            output = self._model_generate(context=ids, max_length=length, stop=stops, **how, **kwargs)
            answer = self.tok_decode(output[0, ids.shape[1] :].tolist())
            for stop in stops:
                answer = answer.split(stop)[0] if stop else answer
            answers.append(answer)
            self.cache_hook.add_partial("generate_until", (prompt, options), answer)
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after the passages and the question, and whether it is the greedy one."""
        scores = []
        for prompt, continuation in (request.args for request in requests):
            # an answer is a turn of its own, which begins without white space
            answer = self._encode(continuation.strip())
            if not answer.shape[1]:
                raise ValueError(f"continuation: expected text, got {continuation!r}")
            ids, how = self._request(prompt)
            context, memory = how["context_ids"], how["memory"]
            passages = self.model.find_passages(ids, context, memory=memory, count=self._count)[0]
            running = self.model.passage_prompt(self.tokenizer, context[0], passages, self._split(prompt)[1])
            whole = torch.cat((running, answer), 1)
            if whole.shape[1] > self.model.config.window:
                raise ValueError(
                    f"passages: expected passages, question and continuation of at most {self.model.config.window} "
                    f"tokens (config.window), got {whole.shape[1]}"
                )
            # an integer: also of the last token, which nothing follows
            logits = self.model(whole, memory=memory, logits_to_keep=answer.shape[1] + 1).logits[0, :-1].float()
            found = logits.log_softmax(-1).gather(1, answer[0, :, None])
            scores.append((float(found.sum()), bool((logits.argmax(-1) == answer[0]).all())))
            self.cache_hook.add_partial("loglikelihood", (prompt, continuation), scores[-1])
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: a text without a question has none to find passages for."""
        raise ValueError(
            "loglikelihood_rolling: expected requests with a question, got whole texts; `sharedllm perplexity` "
            "measures them"
        )

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """Refused: ``config.passage_prompt`` is the template."""
        raise ValueError(_TEMPLATE)
