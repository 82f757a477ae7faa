"""A tiny vision-language judge: a LLaVA that scores bright images 4.5 and dark ones 1.5.

It is made from its config, and trained for some seconds on one CPU thread. A word is a token to it,
and of a question it knows no word; so it answers the same to all questions.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

BRIGHT, DARK = "4.5", "1.5"
SPECIAL = ["<pad>", "<unk>", "<im_start>", "<im_end>", "<image>"]
WORDS = [*SPECIAL, "user", "assistant", "Final", "Score:", BRIGHT, DARK]
ID = {word: i for i, word in enumerate(WORDS)}
END = ID["<im_end>"]
ANSWER = ["Final", "Score:", "{}", "<im_end>"]
TEMPLATE = (
    "{% for message in messages %}<im_start> {{ message.role }} "
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image> {% endif %}"
    "{% endfor %} <im_end> {% endfor %}<im_start> assistant "
)
PIXELS, PATCH = 56, 14


def tiny_judge(cache: Path) -> str:
    """The folder of the judge; made below `cache` unless one of this very file is there."""
    folder = cache / f"tiny-judge-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}"
    if not folder.exists():
        made = folder.with_suffix(f".{os.getpid()}")
        train(made)
        made.rename(folder)
    return str(folder)


def train(folder: Path, steps: int = 80) -> None:
    """Trains a judge and saves it as `transformers serve` finds it."""
    import torch
    from transformers import GenerationConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    processor = make_processor()
    model = LlavaForConditionalGeneration(make_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for step in range(steps):
        loss, _ = forward(model, processor, *examples(random, 16), question(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    images, answers = examples(random, 64)
    with torch.no_grad():
        _, written = forward(model, processor, images, answers, question(0))
    assert written == answers, "the judge did not learn to tell bright from dark"
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=ID["<pad>"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def forward(model, processor, images, answers, asked):
    """The loss of `answers` to images, and what the model would write word by word."""
    texts = [f"{asked}{answer}" for answer in answers]
    inputs = processor(text=texts, images=images, return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, : -len(ANSWER)] = -100
    out = model(**inputs, labels=labels)
    best = out.logits[:, -len(ANSWER) - 1 : -1].argmax(-1).tolist()
    return out.loss, [" ".join(WORDS[i] for i in row) for row in best]


def examples(random: np.random.Generator, count: int):
    """Images, uint8 [512, 512, 3], half of them above middle brightness, and their answers."""
    images, answers = [], []
    for i in range(count):
        middle = random.uniform(190, 255) if i % 2 else random.uniform(0, 135)
        spread = random.uniform(0, 60)
        coarse = middle + random.uniform(-spread, spread, (8, 8, 3))
        images.append(np.kron(coarse.clip(0, 255), np.ones((16, 16, 1))).astype(np.uint8))
        answers.append(" ".join(ANSWER).format(BRIGHT if i % 2 else DARK))
    return images, answers


def question(step: int) -> str:
    """An image and some words behind it; how many depends on the step."""
    words = "word " * (20 + 13 * (step % 11))
    return f"<im_start> user <image> {words} <im_end> <im_start> assistant "


def make_processor():
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens([AddedToken(token) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<im_end>"
    )
    side = {"height": PIXELS, "width": PIXELS}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def make_config():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    size = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, image_size=PIXELS, patch_size=PATCH, **size
    )
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, eos_token_id=END, **size
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=ID["<image>"])
