"""Programs that train and judge a SynapseModel: `accelerate launch recipes/train.py`.

config.py what a run is · data.py text to batches · optim.py AdamW and its schedule · evaluation.py bits per byte ·
checkpoint.py weights and optimizer as one · trainer.py the loop · display.py the terminal · train.py the program
"""
