"""Trains a SynapseModel on text: `accelerate launch recipes/train.py`, or `python -m recipes.train`.

One process or several, CPU or GPU. A step is a function of the weights, the seed and its number; with `--steps` as the
budget a run that was stopped and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from recipes import checkpoint
from recipes._accelerate import Accelerator, PartialState, broadcast_object_list, parse_flag_from_env
from recipes.config import Command, RunConfig, parse, resumed
from recipes.data import SEPARATOR, ByteTokenizer, Corpus, load_corpus
from recipes.display import clock, comparison
from recipes.evaluation import compressors
from recipes.malloc import keep_freed_memory
from recipes.trainer import Trainer, on_main
from synapse_arch import Sampling, SynapseModel, TraceSpec
from synapse_arch.errors import ConfigError, DataError, SynapseError, explain

TRACED = 512
CODE_PROMPT = "import os\n\n\ndef read_lines(path):\n"
GO_ON = "accelerate launch recipes/train.py"


def precision(choice: str, state: PartialState) -> str:
    """What `mixed_precision` comes to: with "auto", a matrix product measured on the main process's device decides."""
    if choice != "auto":
        return choice
    result = [""]
    if state.is_main_process:
        result = ["bf16" if speedup_bf16(state.device) >= 1.5 else "no"]
    return str(broadcast_object_list(result)[0])


def speedup_bf16(device: torch.device) -> float:
    """How many times faster a 1024 × 512 × 512 matrix product runs in bf16 than in float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1024, 512, device=device).to(dtype), torch.randn(512, 512, device=device).to(dtype)
        best = math.inf
        for _ in range(6):
            start = time.perf_counter()
            (a @ b).sum().item()
            best = min(best, time.perf_counter() - start)
        seconds[dtype] = best
    return seconds[torch.float32] / seconds[torch.bfloat16]


def configure(command: Command, state: PartialState) -> tuple[RunConfig, Corpus]:
    """The run to do and its text, checked before anything is computed or written."""
    ByteTokenizer().encode(command.prompt or "")
    fingerprint = None
    if command.resume:
        stored, fingerprint = checkpoint.read_run(command.out)
        config = resumed(RunConfig.from_dict(stored), command.given)
    else:
        config = RunConfig.from_dict(command.given)
        config.model_config()
        if not command.overwrite:
            on_main(state, lambda: checkpoint.refuse_used(command.out))
        config = replace(config, mixed_precision=precision(config.mixed_precision, state))
    if config.batch_size % state.num_processes:
        expected = f"a multiple of the {state.num_processes} processes"
        raise ConfigError(explain("batch_size", expected, config.batch_size, "change --batch-size"))
    corpus = load_corpus(Path(config.data) if config.data else None)
    if fingerprint not in (None, corpus.fingerprint):
        got = f"{corpus.fingerprint} of {corpus.source}"
        raise DataError(explain("corpus of the run", fingerprint, got, "restore the text it was trained on"))
    return config, corpus


def use_cpu(config: RunConfig, state: PartialState) -> None:
    """Sets the threads of a process that computes on the CPU (launchers tend to leave it with one) and its malloc."""
    if state.device.type != "cpu":
        return
    keep_freed_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    torch.set_num_threads(config.threads or max(1, cores // processes))


def sample(model: SynapseModel, prompt: str, *, tokens: int, seed: int) -> None:
    """Prints what the model makes of `prompt`, as it comes."""
    tokenizer = ByteTokenizer()
    ids = torch.tensor([tokenizer.encode("\0" + prompt)], device=next(model.parameters()).device)
    sampling = Sampling(temperature=0.7, top_p=0.95, stop=((SEPARATOR,),), max_tokens=tokens, seed=seed)
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
    text = bytes(stream[stream != SEPARATOR].tolist())
    rivals = compressors(text)
    documents = int((stream == SEPARATOR).sum())
    print("\n" + comparison(bits.per_byte, rivals, count=bits.count, documents=documents) + "\n")
    progress = trainer.progress
    figures = {"bits_per_byte": {"model": bits.per_byte, **rivals}, "bytes": bits.count}
    checkpoint.write_json(trainer.out / checkpoint.RESULT_FILE, {**asdict(progress), **figures})
    model = trainer.accelerator.unwrap_model(trainer.wrapped, keep_fp32_wrapper=False).eval()
    if command.sample_tokens:
        prompt = command.prompt or (CODE_PROMPT if trainer.config.data is None else text[:64].decode(errors="ignore"))
        sample(model, prompt, tokens=command.sample_tokens, seed=trainer.config.seed)
    with torch.no_grad():
        seen = model(stream[None, :TRACED].long().to(trainer.accelerator.device), trace=TraceSpec(level="full"))
    print(f"Inside, over the first {min(TRACED, len(stream))} bytes of held-out text:\n\n{seen.trace.report()}\n")
    folder = checkpoint.latest(trainer.out)
    print(f"The model is in {folder}\n  in Python:  SynapseModel.from_pretrained({str(folder)!r})")
    config = trainer.config
    more = f"--steps {2 * config.steps}" if config.steps else f"--minutes {2 * config.minutes:g}"
    print(f"  go on:      {GO_ON} --out {trainer.out} --resume {more}")


def train(command: Command) -> bool:
    """Does what the command line asks for; False when the run was stopped before its end."""
    # Said outright, since several processes on a machine without an accelerator are otherwise as many runs of one.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    config, corpus = configure(command, state)
    use_cpu(config, state)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=cpu)
    trainer = Trainer(config, command, corpus, accelerator)
    on_main(accelerator, lambda: start(trainer, corpus, command))
    finished = trainer.run()
    if finished:
        report(trainer, command)
    elif trainer.main:
        where = f"step {trainer.progress.step}, saved in {checkpoint.latest(trainer.out)}"
        print(f"\nStopped at {where}\nGo on with: {GO_ON} --out {trainer.out} --resume")
    accelerator.wait_for_everyone()  # no process takes its connections down while another still works
    return finished


def start(trainer: Trainer, corpus: Corpus, command: Command) -> None:
    """Makes the folder ready, writes down what will run, and says it."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    checkpoint.prepare_folder(trainer.out, parameters=parameters, clear=not command.resume)
    checkpoint.open_run(trainer.out, trainer.config.to_dict(), corpus.fingerprint, step=trainer.progress.step)
    config, accelerator = trainer.config, trainer.accelerator
    budget = f"{config.steps:,} steps" if config.steps else f"{config.minutes:g} minutes"
    sizes = [sum(len(document.data) for document in side) / 1e6 for side in (corpus.train, corpus.held_out)]
    print(f"text    {corpus.source}: {sizes[0]:.2f} MB to train on, {sizes[1]:.2f} MB held out")
    print(f"model   {config.preset}, {parameters / 1e6:.2f}M parameters")
    where = f"{accelerator.num_processes} × {accelerator.device.type} ({torch.get_num_threads()} threads)"
    shape = f"{config.batch_size} × {config.length} bytes a step"
    print(f"run     {budget}, {shape}, on {where}, mixed precision {config.mixed_precision}")
    if trainer.progress.step:
        print(f"resumed at step {trainer.progress.step:,}, {clock(trainer.progress.seconds)} in")


def main(argv: list[str] | None = None) -> int:
    """The program; returns 0 when the run ended or was stopped and saved, 1 after an error, 130 when cut short."""
    command = parse(argv)
    try:
        train(command)
    except SynapseError as error:
        if PartialState().is_main_process:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was saved before is in {command.out}", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
