"""Merging of models trained from one base: `python -m merge.ties --base BASE --models A B --out OUT`.

io.py checkpoints read tensor by tensor · adapters.py peft's LoRA as task vectors · writer.py folders that appear
whole · select.py exact magnitudes · ties.py and methods.py the mathematics · recipe.py what a merge is · run.py
the merge · card.py the model card · cli.py the command line · align.py experts in each other's slots · upcycle.py
expert pools out of dense models · search.py settings by held-out text · report.py and picture.py what was merged
"""
