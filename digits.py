"""A small ViT for attend.py and the notebook when there is no checkpoint.

It is trained on scikit-learn's handwritten digits, which takes seconds and downloads nothing.
"""

import torch
import torch.nn.functional as F

from data_utils import Data, load_data
from models.configs import ViTConfig
from models.cpu import use_cpu_kernels
from models.modeling import VisionTransformer
from utils.augment import Augmentation
from utils.images import Decoding
from utils.metrics import predict_dataset
from utils.precision import Precision
from utils.scheduler import learning_rate
from utils.stream import EvalStream, Shard, TrainStream

CONFIG = ViTConfig(patch_size=4, hidden_size=64, mlp_dim=128, num_heads=4, num_layers=3)
CPU = torch.device("cpu")


def digits_model(steps: int = 200) -> tuple[VisionTransformer, Data]:
    """(the trained model in evaluation mode, its data). Prints one line with the accuracy."""
    data = load_data("digits", ".", val_fraction=0, seed=0, decoding=Decoding(channels=1))
    torch.manual_seed(0)
    model = use_cpu_kernels(VisionTransformer(CONFIG, 32, len(data.classes), in_channels=1))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    crops = Augmentation("crop", model.img_size, min_area=0.7)
    stream = TrainStream(data.train, crops, seed=0, batch_size=64, shard=Shard(), device=CPU)
    for step, (micro_batch,) in enumerate(stream.steps(0, steps)):
        lr = learning_rate(step, base=3e-3, total=steps, warmup=20, decay="cosine")
        optimizer.param_groups[0]["lr"] = lr
        images, labels = stream.prepare(micro_batch)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    evaluation = EvalStream(data.val, model.img_size, batch_size=360, device=CPU)
    accuracy = predict_dataset(model, evaluation, Precision(model)).accuracy
    print(f"trained on {data.source}: {data.val_split} accuracy {accuracy:.4f}")
    return model, data
