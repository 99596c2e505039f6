"""Devices in child processes. Messages between processes have fixed layouts; nothing is pickled.

job.py: what a process loads. messages.py: steps and results as bytes. board.py: shared memory for a message. child.py:
the main loop of a child process. group.py: the group of processes as one Executable.
"""

from intaglio.devices.processes.forkserver import ForkServer, child_environment
from intaglio.devices.processes.group import GroupExecutable, RankStart
from intaglio.devices.processes.job import Job

__all__ = ["ForkServer", "GroupExecutable", "Job", "RankStart", "child_environment"]
