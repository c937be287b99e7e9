"""Train the adapters that ship with the demo, StyleInject and LoRA of as many parameters for every style.

python scripts/demo/train_adapters.py [--styles noto openmoji-line] [--steps 400]
python scripts/demo/train_adapters.py --styles all --steps 1000

The styles' names in the files were given afterwards, by what Style Grid draws with each alone: another training has others.
Those of "all" are the words that call them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from styleinject_core import save_adapter
from styleinject_core.demo import data, styles
from styleinject_core.train.run.watch import ProgressBar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*data.STYLE_WORDS, styles.ALL]
    parser.add_argument("--styles", nargs="+", choices=every, default=every)
    parser.add_argument("--methods", nargs="+", choices=list(styles.CONFIGS), default=list(styles.CONFIGS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, help="default 2e-3, of all styles 3e-3")
    args = parser.parse_args()
    model = styles.DemoModel()
    data.ADAPTERS.mkdir(exist_ok=True)
    for style in args.styles:
        for method in args.methods:
            adapter = styles.new_adapter(style, method)
            print(f"{style} {method} ({adapter.parameter_count():,} parameters)")
            with ProgressBar(args.steps) as bar:
                styles.train_style(model, adapter, style, steps=args.steps, learning_rate=args.learning_rate, observer=bar)
            note = {"styleinject.steps": str(args.steps), "modelspec.license": styles.license_of(style)}
            save_adapter(adapter.half(), styles.adapter_path(style, method), note)


if __name__ == "__main__":
    main()
