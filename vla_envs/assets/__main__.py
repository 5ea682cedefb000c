"""Compare the built-in assets' physics with LIBERO's own asset folder, or read it anew:

python -m vla_envs.assets --check path/to/libero_assets   # is physics.json still LIBERO's?
python -m vla_envs.assets --write path/to/libero_assets   # read it anew, after adding an appearance
"""

import argparse
import json
from pathlib import Path

from vla_envs.assets.builtin import PHYSICS, read_physics


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vla_envs.assets", description="Compare physics.json with LIBERO's own asset folder."
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--check", type=Path, metavar="FOLDER", help="compare, and exit with status 1 if they differ"
    )
    action.add_argument("--write", type=Path, metavar="FOLDER", help="read the physics anew")
    args = parser.parse_args()
    if args.write:
        PHYSICS.write_text(json.dumps(read_physics(args.write), indent=1) + "\n")
        return
    ours, theirs = json.loads(PHYSICS.read_text()), read_physics(args.check)
    same = {"contact": ours["contact"] == theirs["contact"]}
    same |= {name: ours["elements"].get(name) == physics for name, physics in theirs["elements"].items()}
    for name, equal in same.items():
        print(f"{'same  ' if equal else 'DIFFER'}  {name}")
    raise SystemExit(not all(same.values()))


if __name__ == "__main__":
    main()
