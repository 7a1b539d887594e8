"""A script that does what timm's train.py does around a model, for two steps."""

import argparse
import os
from contextlib import nullcontext

import torch
from timm.models import create_model
from timm.task import ClassificationTask
from timm.utils import update_summary

parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("--out", "--output", "--experiment", "--torchcompile"):
    parser.add_argument(name)
for name in ("--amp", "--grad-checkpointing", "--model-ema"):
    parser.add_argument(name, action="store_true")
args, _ = parser.parse_known_args()

torch.manual_seed(0)
model = create_model("test_vit", img_size=32, depth=2, num_classes=10)
if args.grad_checkpointing:
    model.set_grad_checkpointing(enable=True)
if not args.amp:
    model.double()
start = {name: value.clone() for name, value in model.state_dict().items()}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
teacher = create_model("test_vit", img_size=32, depth=2, num_classes=10)
task = ClassificationTask(model, torch.nn.CrossEntropyLoss())
if args.model_ema:
    task.setup_ema(decay=0.5)
if args.torchcompile:
    task.compile(backend=args.torchcompile)

batches, losses = [], []
for _ in range(2):
    x = torch.randn(4, 3, 32, 32, dtype=torch.float32 if args.amp else torch.float64)
    y = torch.randint(10, (4,))
    batches.append((x, y))
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if args.amp else nullcontext():
        loss = task(x, y)["loss"]
    loss.backward()
    optimizer.step()
    task.update_ema()
    losses.append(loss.item())

if args.out:
    out = {"start": start, "batches": batches, "end": model.state_dict()}
    torch.save({**out, "gradients": {name: p.grad for name, p in model.named_parameters()}}, args.out)
if args.output:
    os.makedirs(f"{args.output}/{args.experiment}", exist_ok=True)
    for epoch, loss in enumerate(losses):
        file = f"{args.output}/{args.experiment}/summary.csv"
        update_summary(epoch, {"loss": loss}, {}, filename=file, write_header=epoch == 0)
