"""A training loop of your own: softmax regression on scanned digits, as you may have it already."""

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import hpo


def train(trial: hpo.Trial) -> None:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32, device=trial.device)
    targets = torch.tensor(labels, device=trial.device)
    torch.manual_seed(trial.seed)
    model = torch.nn.Linear(images.shape[1], 10, device=trial.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=trial.params["lr"])

    first_epoch, checkpoint = 1, trial.checkpoint_dir / "last.pt"
    if checkpoint.exists():  # an earlier attempt was interrupted: resume it
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        first_epoch = saved["epoch"] + 1

    for epoch in range(first_epoch, trial.epochs + 1):
        torch.manual_seed(trial.seed + epoch)  # the order of an epoch's batches does not depend on interruptions
        for batch in torch.randperm(1437).split(64):
            loss = F.cross_entropy(model(images[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (model(images[1437:]).argmax(1) == targets[1437:]).float().mean()
        end = trial.report(epoch, train_loss=loss.item(), val_accuracy=accuracy.item())
        torch.save({"model": model.state_dict(), "epoch": epoch}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        if end:
            return  # pruned, or told to stop
