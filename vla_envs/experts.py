"""Record demonstrations of a scripted expert for pick-and-place.

The expert plays all tasks of LIBERO-Object and LIBERO-Spatial. In LIBERO-Goal it plays those that put one
thing somewhere: the bowl on the stove (1), on the cabinet (4) and on the plate (8), the wine bottle on the
cabinet (2) and on the rack (9), and the cream cheese in the bowl (6). In LIBERO-10 it plays those that put
two things in the basket (0, 7).

    python -m vla_envs.experts --task-ids 4 --episodes 8 --out demos --videos
    python -m vla_envs.experts --suite LiberoSpatial --task-ids 3 --episodes 8 --out demos

The first command writes ``demos/LiberoObject_4_demo.hdf5`` and a video of the episodes.
"""

from vla_envs.command_line import one_line_errors, parse_args
from vla_envs.demos.expert import COVERED, LIMITS, ScriptedExpert, require_covered
from vla_envs.demos.hdf5 import write_hdf5
from vla_envs.demos.recording import Args, main, record

__all__ = ["COVERED", "LIMITS", "Args", "ScriptedExpert", "main", "record", "require_covered", "write_hdf5"]

if __name__ == "__main__":
    arguments = parse_args(Args)
    with one_line_errors():
        main(arguments)
