"""Make the `demo` model from nothing: `python -m tools.demo.train`.

Four stages. *See*: the vision tower and the resampler learn, through small heads that are thrown away afterwards, what
lies where: for each patch the shape it belongs to, and in the first latents the shapes from left to right. *Speak*:
the whole model learns to caption and to answer, in the official prompt templates. *Default*: with its eyes as they are,
it learns to do so after the text-only shots of the default protocol. *Slips*: the same, with words of the answers
replaced, so that a text that has gone wrong becomes as long as the right one. Scenes are drawn from seeds in order, so
a run can stop anywhere and resumes from its last saved state; seeds from `EVALUATION_SEEDS` on are never drawn here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import GenerationConfig, IdeficsConfig

from idefics_cli.demo.scene import EVALUATION_SEEDS, MAX_OBJECTS
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.model.modeling import IdeficsForVisionText2Text
from idefics_cli.prompts.tokenize import PromptEncoder
from tools.demo.lessons import ATTRIBUTES, IGNORED, MEANT, Lesson, LessonPlan, Texts
from tools.demo.tokenizer import build_tokenizer

IMAGE_SIZE, PATCH_SIZE = 64, 8
RECORD_EVERY, SAVE_EVERY, QUIZ_EVERY = 50, 100, 200
FIRST_WORD = 3 + 256  # in the vocabulary, after special tokens and single bytes
QUIZ_SEED, QUIZ_SCENES = 990_000_000, 96
TEXT_GROUPS = ("caption", "question", "shots", "published caption", "published question")


@dataclass(frozen=True)
class Stage:
    """`steps` lessons of `scenes` images each, drawn from `first_seed` on.

    `matrix_rate` is Muon's, `other_rate` AdamW's; the eyes (vision tower and resampler) learn at `eyes_share` of them.
    At a share of zero they are left as they are. The rates fall to zero over the last `decay` part of the steps. Of
    each lesson `captions` images are captioned, and each is asked `questions` questions; `published` images are
    captioned and asked after the text-only shots of the default protocol. `slips` is the share of an answer's words
    that are replaced by others.
    """

    name: str
    steps: int
    first_seed: int
    scenes: int = 64
    easy_steps: int = 0
    matrix_rate: float = 0.02
    other_rate: float = 2e-3
    eyes_share: float = 1.0
    decay: float = 0.4
    captions: int = 0
    questions: int = 0
    published: int = 0
    slips: float = 0.0


def stages(scale: float) -> tuple[Stage, ...]:
    """All stages; `scale` shortens or lengthens them."""
    see = Stage("see", round(2000 * scale), first_seed=0, easy_steps=round(300 * scale))
    speak = Stage(
        "speak",
        round(1500 * scale),
        first_seed=500_000_000,
        scenes=32,
        eyes_share=0.15,
        captions=16,
        questions=6,
    )
    default = Stage(
        "default",
        round(480 * scale),
        first_seed=900_000_000,
        scenes=32,
        matrix_rate=0.01,
        other_rate=1e-3,
        eyes_share=0.0,
        decay=0.7,
        captions=8,
        questions=2,
        published=24,
    )
    slips = replace(default, name="slips", steps=round(320 * scale), slips=0.15)
    return see, speak, default, slips


def demo_config(vocab_size: int) -> IdeficsConfig:
    return IdeficsConfig(
        vocab_size=vocab_size,
        additional_vocab_size=2,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=1,
        qk_layer_norms=True,
        alpha_type="float",
        alpha_initializer="ones",
        use_resampler=True,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        vision_config={
            "embed_dim": 128,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 16,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "qk_layer_norms_perceiver": True,
        },
    )


class Tutor(nn.Module):
    """Heads that ask the eyes what they see: the kind and rank of the shape under each patch, and the shapes in order.

    Patch answers: size, color, shape, rank from the left (each a class) and whether anything is there. Latent i is
    asked for size, color and shape of the i-th object from the left, with one class more for "there is none".
    """

    def __init__(self, dim: int):
        super().__init__()
        kinds = {name: len(values) for name, values in ATTRIBUTES.items()}
        self.patch_heads = nn.ModuleDict(
            {name: nn.Linear(dim, count) for name, count in {**kinds, "rank": MAX_OBJECTS, "covered": 2}.items()}
        )
        slot_kinds = {**kinds, "pair": kinds["color"] * kinds["shape"]}
        self.slot_heads = nn.ModuleDict({name: nn.Linear(dim, count + 1) for name, count in slot_kinds.items()})

    def forward(self, patches: Tensor, latents: Tensor, objects: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`patches` (scenes, patches, dim), `latents` (scenes, latents, dim) -> loss and the share of right answers."""
        losses, right = [], {}
        for name, target in patch_targets(objects).items():
            logits = self.patch_heads[name](patches)  # (scenes, patches, classes)
            losses.append(cross_entropy(logits, target))
            right[f"patch {name}"] = share_right(logits, target)
        for name, target in slot_targets(objects).items():
            # Readouts of length one: what is read must be large in the latents, so that attention finds it as well.
            head = self.slot_heads[name]
            readouts = nn.functional.normalize(head.weight, dim=-1)
            logits = nn.functional.linear(latents[:, :MAX_OBJECTS], readouts, head.bias)
            losses.append(cross_entropy(logits, target))
            right[f"slot {name}"] = share_right(logits, target)
        return torch.stack(losses).mean(), right


def slot_targets(objects: Tensor) -> dict[str, Tensor]:
    """(scenes, MAX_OBJECTS, 6) -> for each answer (scenes, MAX_OBJECTS): the class, the last one where no object is."""
    kinds = {name: objects[:, :, 3 + index].long() for index, name in enumerate(ATTRIBUTES)}
    counts = {name: len(values) for name, values in ATTRIBUTES.items()}
    kinds["pair"] = kinds["color"] * counts["shape"] + kinds["shape"]
    counts["pair"] = counts["color"] * counts["shape"]
    return {name: torch.where(objects[:, :, 3] == IGNORED, counts[name], kind) for name, kind in kinds.items()}


def patch_targets(objects: Tensor) -> dict[str, Tensor]:
    """(scenes, MAX_OBJECTS, 6) -> for each answer (scenes, patches): the class, IGNORED where nothing lies."""
    grid = IMAGE_SIZE // PATCH_SIZE
    centers = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    place = torch.stack([x, y], dim=-1).flatten(0, 1)  # (patches, 2)
    distance = (objects[:, None, :, :2] - place[None, :, None]).norm(dim=-1)  # (scenes, patches, MAX_OBJECTS)
    reach = objects[:, None, :, 2] + 0.35 / grid
    inside = (distance < reach) & (objects[:, None, :, 3] != IGNORED)
    covered, rank = inside.any(dim=-1), torch.where(inside, distance - reach, torch.inf).argmin(dim=-1)
    targets = {"covered": covered.long(), "rank": rank.masked_fill(~covered, IGNORED)}
    for index, name in enumerate(ATTRIBUTES):
        kinds = objects[:, :, 3 + index].long().gather(1, rank)  # (scenes, patches)
        targets[name] = kinds.masked_fill(~covered, IGNORED)
    return targets


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over what is asked; 0 where nothing is."""
    logits, target = logits.flatten(0, -2).float(), target.flatten()
    total = nn.functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
    return total / (target != IGNORED).sum().clamp(min=1)


def share_right(logits: Tensor, target: Tensor) -> Tensor:
    asked = target != IGNORED
    return (logits.argmax(dim=-1) == target)[asked].sum() / asked.sum().clamp(min=1)


class ReadingTutor(nn.Module):
    """Heads that ask the decoder, after half of its layers and at the words that mean objects, what these are.

    An answer alone says little of how it is found: a lookup is learned where it has to happen, before it is used.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(dim, count) for name, count in MEANT.items()})

    def forward(self, hidden_states: Tensor, meant: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden_states` (mentions, dim), `meant` (mentions, MEANT) -> loss and the share of right answers."""
        asked = [
            (head(hidden_states), target) for head, target in zip(self.heads.values(), meant.unbind(1), strict=True)
        ]
        losses, right = zip(*[(cross_entropy(*pair), share_right(*pair)) for pair in asked], strict=True)
        return torch.stack(losses).mean(), torch.stack(right).mean()


class Pupil(nn.Module):
    """The model with its tutors: a lesson in, a loss and shares of right answers out."""

    def __init__(self, model: IdeficsForVisionText2Text):
        super().__init__()
        self.model = model
        self.tutor = Tutor(model.config.vision_config.embed_dim)
        self.reading_tutor = ReadingTutor(model.config.hidden_size)
        self.eyes_learn, self.slips = True, 0.0
        self.end = int(model.config.eos_token_id)
        self.halfway: Tensor | None = None
        layers = model.model.layers
        layers[(len(layers) - 1) // 2].register_forward_hook(self._keep_halfway)

    def _keep_halfway(self, layer: nn.Module, arguments: tuple, hidden_states: Tensor) -> None:
        self.halfway = hidden_states

    def forward(self, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        network = self.model.model
        with torch.set_grad_enabled(self.eyes_learn and torch.is_grad_enabled()):
            patches = network.vision_model(lesson.pixel_values).last_hidden_state
            latents = network.perceiver_resampler(patches)
            loss, right = self.tutor(patches[:, 1:], latents, lesson.objects)
        for name, texts in zip(TEXT_GROUPS, lesson.texts, strict=False):
            text_loss, right[f"{name} tokens"] = self._read(latents, texts)
            loss = loss + text_loss
            if len(texts.places):
                rows, places = texts.places.unbind(1)
                meant_loss, right[f"{name} meant"] = self.reading_tutor(self.halfway[rows, places], texts.meant)
                loss = loss + meant_loss
        return loss, right

    def _read(self, latents: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        logits, target = self.answers(latents, texts)
        asked = target != IGNORED
        return cross_entropy(logits, target[asked]), share_right(logits, target[asked])

    def answers(self, latents: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """(answer tokens, vocabulary), and what stands there: (rows, tokens)."""
        hidden_states = self.model.model(
            input_ids=self._with_slips(texts) if self.slips and torch.is_grad_enabled() else texts.input_ids,
            attention_mask=texts.attention_mask,
            perceiver_embeddings=latents[texts.images],  # (rows, images, latents, dim)
            image_attention_mask=texts.image_attention_mask,
            use_cache=False,
        ).last_hidden_state
        target = texts.labels[:, 1:]
        asked = target != IGNORED
        return self.model.lm_head(hidden_states[:, :-1][asked]), target

    def _with_slips(self, texts: Texts) -> Tensor:
        """The texts with some words of their answers replaced: half by words of other answers, half by any.

        What is to follow stays as it is. So a beam that has left out a word goes on to the length of the right text;
        ended early, three of them would end the search before that is whole.
        """
        of_answers = (texts.labels != IGNORED) & (texts.labels != self.end)
        words = texts.labels[of_answers]
        others = torch.cat([words, torch.randint(FIRST_WORD, self.model.config.vocab_size, words.shape)])
        drawn = others[torch.randint(len(others), of_answers.shape)]
        return torch.where(of_answers & (torch.rand(of_answers.shape) < self.slips), drawn, texts.input_ids)

    @torch.no_grad()
    def quiz(self, pixel_values: Tensor, texts: dict[str, Texts]) -> dict[str, float]:
        """The share of texts of each kind that are right to the last token."""
        network = self.model.model
        latents = network.perceiver_resampler(network.vision_model(pixel_values).last_hidden_state)
        shares = {}
        for kind, rows in texts.items():
            logits, target = self.answers(latents, rows)
            wrong = torch.zeros(target.shape, dtype=torch.bool, device=target.device)
            asked = target != IGNORED
            wrong[asked] = logits.argmax(dim=-1) != target[asked]
            shares[kind] = 1 - float(wrong.any(dim=1).float().mean())
        return shares


def optimizers(pupil: Pupil, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices between layers, AdamW for embeddings, heads, norms and gates."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in pupil.named_parameters():
        of_eyes = any(word in name for word in ("vision_model", "perceiver", "tutor"))
        embedding_or_head = any(word in name for word in ("embed", "lm_head", "tutor", "latents"))
        groups.setdefault((parameter.dim() == 2 and not embedding_or_head, of_eyes), []).append(parameter)

    def of_kind(matrices: bool) -> list[dict]:
        shares = ((False, 1.0), (True, stage.eyes_share))
        return [{"params": groups[matrices, of_eyes], "share": share} for of_eyes, share in shares]

    return [
        torch.optim.Muon(of_kind(matrices=True), lr=stage.matrix_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(of_kind(matrices=False), lr=stage.other_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def rate(stage: Stage, step: int) -> float:
    """Share of the full rate: a short rise, a plateau, a straight fall to zero."""
    warm, fall = 100, stage.decay * stage.steps
    return min(1.0, (step + 1) / warm, (stage.steps - step) / fall)


class Training:
    """One run: its model, where it stands, and its checkpoint in `folder`."""

    def __init__(self, folder: Path, device: str, scale: float, threads: int):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        self.folder, self.device = folder, device
        self.stages = stages(scale)
        self.tokenizer = build_tokenizer()
        self.encoder = PromptEncoder(self.tokenizer)
        self.images = ImageProcessor(image_size=IMAGE_SIZE)
        config = demo_config(self.tokenizer.vocab_size)
        self.pupil = Pupil(IdeficsForVisionText2Text._from_config(config, attn_implementation="eager")).to(device)
        self.state_file = folder / "training.pt"
        folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        finished, position = self._resume()
        for index, stage in enumerate(self.stages):
            if index >= finished:
                self._run_stage(index, stage, position if index == finished else None)
        self.export(self.folder / "checkpoint")

    def _resume(self) -> tuple[int, dict | None]:
        if not self.state_file.exists():
            return 0, None
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.pupil.load_state_dict(state["pupil"])
        return state["stage"], state

    def _run_stage(self, index: int, stage: Stage, state: dict | None) -> None:
        self.pupil.eyes_learn, self.pupil.slips = stage.eyes_share > 0, stage.slips
        both = optimizers(self.pupil, stage)
        first = 0
        if state is not None and state["optimizers"]:
            first = state["step"]
            for optimizer, saved in zip(both, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        with tqdm(total=stage.steps, initial=first, desc=stage.name, unit="lesson", file=sys.stderr) as bar:
            for done, lesson in enumerate(self._lessons(stage, first), start=first + 1):
                measured = self._step(stage, done - 1, lesson, both)
                bar.update()
                if done % RECORD_EVERY == 0:
                    self._record(stage, done, measured, bar)
                if stage.questions and (done % QUIZ_EVERY == 0 or done == stage.steps):
                    self._record(stage, done, self._quiz(stage), bar)
                if done % SAVE_EVERY == 0:
                    self._save(index, done, both)
        self._save(index + 1, 0, [])

    def _lessons(self, stage: Stage, first: int) -> DataLoader:
        last_seed = stage.first_seed + stage.steps * stage.scenes
        assert last_seed < EVALUATION_SEEDS, f"training would draw the scenes that measure it: {last_seed}"
        plan = LessonPlan(
            images=self.images,
            encoder=self.encoder,
            scenes=stage.scenes,
            first_seed=stage.first_seed,
            steps=range(first, stage.steps),
            captions=stage.captions,
            questions=stage.questions,
            published=stage.published,
            easy_steps=stage.easy_steps,
        )
        return DataLoader(plan, batch_size=None, num_workers=1, prefetch_factor=8)

    def _step(self, stage: Stage, step: int, lesson: Lesson, both: list[torch.optim.Optimizer]) -> dict[str, float]:
        lesson = Lesson(
            lesson.pixel_values.to(self.device),
            lesson.objects.to(self.device),
            tuple(to_device(texts, self.device) for texts in lesson.texts),
        )
        share = rate(stage, step)
        for optimizer, full in zip(both, (stage.matrix_rate, stage.other_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full * share * group["share"]
        # Written-out attention: on a CPU the fused kernel's backward pass takes half of a step at these sizes.
        with sdpa_kernel([SDPBackend.MATH]), torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16):
            loss, right = self.pupil(lesson)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.pupil.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss.detach()), **{name: float(value) for name, value in right.items()}}

    def _quiz(self, stage: Stage) -> dict[str, float]:
        """On scenes that are neither in the lessons nor among those that measure the finished model."""
        plan = LessonPlan(self.images, self.encoder, QUIZ_SCENES, QUIZ_SEED, range(1), published=stage.published)
        pixels, texts = plan.quiz()
        on_device = {kind: to_device(rows, self.device) for kind, rows in texts.items()}
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16):
            return self.pupil.quiz(pixels.to(self.device), on_device)

    def _record(self, stage: Stage, step: int, measured: dict[str, float], bar: tqdm) -> None:
        """One line of the curve, printed and kept."""
        line = {"stage": stage.name, "step": step, "seconds": round(time.process_time())}
        line.update({name: round(value, 4) for name, value in measured.items()})
        with (self.folder / "curve.jsonl").open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(line) + "\n")
        bar.write(" ".join(f"{name} {value}" for name, value in line.items()), file=sys.stderr)

    def _save(self, stage: int, step: int, both: list[torch.optim.Optimizer]) -> None:
        state = {
            "pupil": self.pupil.state_dict(),
            "stage": stage,
            "step": step,
            "optimizers": [optimizer.state_dict() for optimizer in both],
        }
        written = self.state_file.with_suffix(".tmp")
        torch.save(state, written)
        written.replace(self.state_file)

    def export(self, folder: Path) -> None:
        """An ordinary checkpoint folder; fp16 halves its size and costs nothing that can be measured."""
        model = self.pupil.model.eval()
        tokenizer, encoder = self.tokenizer, self.encoder
        model.generation_config = GenerationConfig(
            bos_token_id=encoder.bos_token_id, eos_token_id=encoder.eos_token_id, pad_token_id=encoder.pad_token_id
        )
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_preprocessor_config(folder)


def write_preprocessor_config(folder: Path) -> None:
    images = ImageProcessor(image_size=IMAGE_SIZE)
    settings = {
        "image_processor_type": "IdeficsImageProcessor",
        "image_num_channels": 3,
        "image_size": images.image_size,
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def to_device(texts: Texts, device: str) -> Texts:
    return Texts(**{name: value.to(device) for name, value in vars(texts).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("demo-training"),
        help="where the run keeps its state, its curve and the finished checkpoint",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="lengthen or shorten all stages")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    try:
        Training(options.folder, options.device, options.scale, options.threads).run()
    except KeyboardInterrupt:
        sys.exit(f"stopped: the same command resumes, losing at most {SAVE_EVERY} lessons")


if __name__ == "__main__":
    main()
