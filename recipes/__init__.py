"""Programs that train, fine-tune and judge a SynapseModel: `accelerate launch recipes/train.py`.

train.py, finetune.py, evaluate.py   the programs; tokenizer.py, curves.py and sharded.py are small ones
command.py, config.py                the command line, and what a run is
sources.py, data.py, tokens.py       text on disk, what of it is held out, the token cache; windows.py batches
trainer.py, optim.py, checkpoint.py  the loop, AdamW and its schedule, a run's folder
health.py, evaluation.py, display.py router and machine, bits per byte, the terminal
"""
