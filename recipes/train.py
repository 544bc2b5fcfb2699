"""Trains a SynapseModel on text: `accelerate launch recipes/train.py`, or `python -m recipes.train`.

One process or several, CPU or GPU. A step is a function of the weights, the seed and its number; with `--steps` as the
budget a run that was stopped and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from recipes import checkpoint, curves, tokens
from recipes._accelerate import (
    Accelerator,
    PartialState,
    broadcast_object_list,
    cpu_only,
    launched_precision,
    tqdm,
)
from recipes.command import Command, parse, resumed, settings
from recipes.compiling import eagerly
from recipes.config import AUTO, RunConfig, show_config
from recipes.data import SEPARATOR, Tokenizer, load_tokenizer, open_source
from recipes.display import clock, comparison
from recipes.evaluation import compressors
from recipes.health import matrix_rate
from recipes.malloc import keep_freed_memory
from recipes.sizing import sized
from recipes.tokenizer import BYTES, TOKENIZER_FILE
from recipes.tokens import Tokens
from recipes.trainer import Trainer, on_main
from synapse_arch import Sampling, SynapseModel, TraceSpec
from synapse_arch.errors import ConfigError, DataError, SynapseError, explain

TRACED = 512
CODE_PROMPT = "import os\n\n\ndef read_lines(path):\n"
GO_ON = "accelerate launch recipes/train.py"


def precision(choice: str, state: PartialState) -> str:
    """What `mixed_precision` comes to: with "auto", the launcher's bf16, or a matrix product measured here decides."""
    if choice != "auto":
        return choice
    if (asked := launched_precision()) is not None:
        return asked
    result = [""]
    if state.is_main_process:
        result = ["bf16" if speedup_bf16(state.device) >= 1.5 else "no"]
    return str(broadcast_object_list(result)[0])


def speedup_bf16(device: torch.device) -> float:
    """How many times faster a 1024 × 512 × 512 matrix product runs in bf16 than in float32."""
    rates = [matrix_rate(device, dtype, (1024, 512, 512)) for dtype in (torch.bfloat16, torch.float32)]
    return rates[0] / rates[1]


def configure(command: Command) -> tuple[RunConfig, Tokenizer]:
    """The run to do and its tokenizer, checked before any text is read."""
    given = settings(command)
    if not command.resume:
        config = RunConfig.from_dict(given)
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        stored, _ = checkpoint.read_run(command.out)
        config = resumed(RunConfig.from_dict(stored), given)
        tokenizer = load_tokenizer(BYTES if config.tokenizer == BYTES else command.out / TOKENIZER_FILE)
    config.model_config(tokenizer.vocab_size)
    tokenizer.encode(command.prompt or "")
    os.environ.setdefault("TRACKIO_DIR", str((command.out / checkpoint.TRACKERS_FOLDER).resolve()))  # read on import
    for name in config.trackers:
        try:
            importlib.import_module(name)
        except ImportError as error:
            remedy = "pip install 'synapse-arch[trackers]', or leave it out"
            raise ConfigError(explain("trackers", f"{name} installed", error, remedy)) from error
    return config, tokenizer


def check_processes(config: RunConfig, count: int) -> None:
    """Refuses a batch that cannot be shared out evenly.

    Raises:
        ConfigError: the batch does not divide.
    """
    if config.batch_size % (count * config.accumulate):
        expected = f"a multiple of {count * config.accumulate}, the processes ({count}) times the parts of each"
        raise ConfigError(explain("batch_size", expected, config.batch_size, "change --batch-size or --accumulate"))


def read_tokens(config: RunConfig, cache: Path, tokenizer: Tokenizer, state: PartialState) -> Tokens:
    """The text as tokens: made by the main process where they are missing, mapped by all.

    Raises:
        DataError: the text cannot be trained on, or the cache not be written.
    """
    source = open_source(Path(config.data) if config.data else None, field=config.field)
    found = [""]

    def make() -> None:
        with tqdm(desc="reading text", unit="B", unit_scale=True, delay=1.0) as bar:
            found[0] = str(tokens.prepare(source, tokenizer, cache, bar.update))

    on_main(state, make)
    folder = Path(broadcast_object_list(found)[0])
    if not folder.is_dir():  # a machine with a disk of its own
        folder = tokens.prepare(source, tokenizer, cache)
    return tokens.load(folder, source.name)


def use_cpu(config: RunConfig, state: PartialState) -> None:
    """Sets the threads of a process that computes on the CPU (launchers tend to leave it with one) and its malloc."""
    if state.device.type != "cpu":
        return
    keep_freed_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    torch.set_num_threads(config.threads or max(1, cores // processes))


def sample(model: SynapseModel, tokenizer: Tokenizer, prompt: str, *, length: int, seed: int) -> None:
    """Prints what the model makes of `prompt`, as it comes."""
    ids = torch.tensor([[SEPARATOR, *tokenizer.encode(prompt)]], device=next(model.parameters()).device)
    sampling = Sampling(temperature=0.7, top_p=0.95, stop=((SEPARATOR,),), max_tokens=length, seed=seed)
    print(f"A sample, after {prompt!r}:\n\n{prompt}", end="")
    for text in tokenizer.decode_stream(token.id for token in model.stream(ids, sampling=sampling)):
        print(text, end="", flush=True)
    print("\n")


def report(trainer: Trainer, command: Command) -> None:
    """What the finished run learned: held-out bits per byte, a sample, the model's inside, and where it all is."""
    if trainer.main:
        print(f"\nTrained {trainer.progress.step:,} steps. Reading the held-out text ...")
    bits = trainer.judge()
    if not trainer.main:
        return
    stream = trainer.held_out
    text = trainer.tokenizer.decode_bytes(token for token in stream.tolist() if token != SEPARATOR)
    rivals = compressors(text)
    documents = int((stream == SEPARATOR).sum())
    print("\n" + comparison(bits.per_byte, rivals, count=bits.count, documents=documents) + "\n")
    progress = trainer.progress
    figures = {"bits_per_byte": {"model": bits.per_byte, **rivals}, "bytes": bits.count}
    checkpoint.write_json(trainer.out / checkpoint.RESULT_FILE, {**asdict(progress), **figures})
    if math.isfinite(bits.per_byte):  # else there is nothing to see
        with eagerly(trainer.config.compile):
            show(trainer, command, text)
    else:
        print("The model computes no finite numbers any more: train anew, with a smaller learning rate.")
    log = trainer.out / checkpoint.LOG_FILE
    if log.exists() and log.stat().st_size:  # not after a handful of steps, nor where all that was logged was lost
        picture = curves.draw(trainer.out)
        print(f"Curves of the run are in {picture}" if picture else f"No picture of the run: {curves.MISSING}")
    folder = checkpoint.latest(trainer.out)
    print(f"The model is in {folder}\n  in Python:  SynapseModel.from_pretrained({str(folder)!r})")
    config = trainer.config
    more = f"--steps {2 * config.steps}" if config.steps else f"--minutes {2 * config.minutes:g}"
    print(f"  go on:      {GO_ON} --out {trainer.out} --resume {more}")


def show(trainer: Trainer, command: Command, text: bytes) -> None:
    """Prints a sample of the finished model, and its inside over the first of the held-out text."""
    model, stream, config = trainer.whole().eval(), trainer.held_out, trainer.config
    if command.sample_tokens:
        prompt = command.prompt or (CODE_PROMPT if config.data is None else text[:64].decode(errors="ignore"))
        sample(model, trainer.tokenizer, prompt, length=command.sample_tokens, seed=config.seed)
    with torch.no_grad():
        ids = stream[None, :TRACED].long().to(next(model.parameters()).device)
        seen = model(ids, trace=TraceSpec(level="full"))
    print(f"Inside, over the first {ids.shape[1]} tokens of held-out text:\n\n{seen.trace.report()}\n")


def train(command: Command) -> bool:
    """Does what the command line asks for; False when the run was stopped before its end."""
    config, tokenizer = configure(command)
    if command.print_config:
        if config.preset == AUTO and not command.resume:
            remedy = "start the run: the size is in its run.json"
            raise ConfigError(explain("--print-config", "a preset of a known size", AUTO, remedy))
        print(show_config(config, config.model_config(tokenizer.vocab_size)))
        return True
    cpu = cpu_only()
    state = PartialState(cpu=cpu)
    check_processes(config, state.num_processes)
    if not (command.resume or command.overwrite):
        on_main(state, lambda: checkpoint.refuse_used(command.out))
    text = read_tokens(config, command.cache, tokenizer, state)
    if command.resume:
        same_text(command, text)
    else:
        config = sized(config, state, vocab_size=tokenizer.vocab_size, tokens=len(text.train))
    config = replace(config, mixed_precision=precision(config.mixed_precision, state))
    use_cpu(config, state)
    with contextlib.ExitStack() as held:
        on_main(state, lambda: held.enter_context(checkpoint.claim(command.out)))
        folder = command.out / checkpoint.TRACKERS_FOLDER
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=cpu,
            log_with=list(config.trackers) or None,
            project_dir=str(folder),
        )
        trainer = Trainer(config, command, text, tokenizer, accelerator)
        on_main(accelerator, lambda: start(trainer, command))
        return finish(trainer, command, trainer.run())


def finish(trainer: Trainer, command: Command, finished: bool) -> bool:
    """Reports what a finished run learned, or where a stopped one is."""
    if finished:
        report(trainer, command)
    elif trainer.main:
        where = f"step {trainer.progress.step}, saved in {checkpoint.latest(trainer.out)}"
        print(f"\nStopped at {where}\nGo on with: {GO_ON} --out {trainer.out} --resume")
    for tracker in trainer.accelerator.trackers:
        tracker.finish()
    trainer.accelerator.wait_for_everyone()  # no process takes its connections down while another still works
    return finished


def same_text(command: Command, text: Tokens) -> None:
    """Refuses to go on with another text.

    Raises:
        DataError: the corpus is not the one the run was started with.
    """
    _, fingerprint = checkpoint.read_run(command.out)
    if fingerprint != text.survey.fingerprint:
        got = f"{text.survey.fingerprint} of {text.source}"
        raise DataError(explain("corpus of the run", fingerprint, got, "restore the text it was trained on"))


def start(trainer: Trainer, command: Command) -> None:
    """Makes the folder ready, writes down what will run, and says it."""
    if not (command.resume or command.overwrite):  # a run may have begun and ended there while the text was read
        checkpoint.refuse_used(trainer.out)
    config, accelerator, text = trainer.config, trainer.accelerator, trainer.tokens
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    keep = config.keep + config.keep_best
    checkpoint.prepare_folder(trainer.out, parameters=parameters, keep=keep, clear=not command.resume)
    values, step = config.to_dict(), trainer.progress.step
    checkpoint.open_run(trainer.out, values, text.survey.fingerprint, trainer.tokenizer, step=step)
    if config.trackers:
        accelerator.init_trackers("synapse", {name: str(value) for name, value in values.items()})
    budget = f"{config.steps:,} steps" if config.steps else f"{config.minutes:g} minutes"
    sizes = [size / 1e6 for size in text.survey.bytes]
    print(f"text    {text.source}: {sizes[0]:.2f} MB to train on, {sizes[1]:.2f} MB held out")
    print(f"model   {config.preset}, {parameters / 1e6:.2f}M parameters, {trainer.tokenizer.vocab_size} tokens")
    where = f"{accelerator.num_processes} × {accelerator.device.type} ({torch.get_num_threads()} threads)"
    shape = f"{config.batch_size} × {config.length} tokens a step"
    print(f"run     {budget}, {shape}, on {where}, mixed precision {config.mixed_precision}")
    if trainer.progress.step:
        print(f"resumed at step {trainer.progress.step:,}, {clock(trainer.progress.seconds)} in")


def main(argv: list[str] | None = None) -> int:
    """The program; returns 0 when the run ended or was stopped and saved, 2 after an error, 130 when cut short."""
    command = parse(argv)
    try:
        train(command)
    except SynapseError as error:
        if PartialState().is_main_process:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was saved before is in {command.out}", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
