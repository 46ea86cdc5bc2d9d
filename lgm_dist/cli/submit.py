"""Runs a command of lgm-dist as a Ray job on a cluster: uploads the code, shows the logs, returns the exit status."""

from __future__ import annotations

import argparse
import os
import sys

from lgm_dist.cluster import jobs

ADDRESS = "http://127.0.0.1:8265"
EPILOG = f"""
examples:
  lgm-dist submit -- lgm-dist train --data fc100 --data-root /shared/data --storage /shared/runs --name first
  lgm-dist submit --stop first

In a checkout, the job runs on the cluster in a copy of it without data, runs and tests; elsewhere, in a copy of the current
folder. So its paths must be absolute and the same on all machines. The same --name and --storage resume a run. Ctrl-C leaves
the job running. The job gets the variables of --env and, if they are set here,
  {", ".join(jobs.PASSED)}.
Ray keeps them in plain text: with the job, for everybody who reaches the cluster's job API, and in runtime_env_agent.log. So
{jobs.KEY} stays here: give it to the cluster's nodes, or pass it with --env {jobs.KEY} if nobody else reaches the cluster.
"""


def main(argv: list[str]) -> None:
    """Do what the arguments ask for. Exits with the status of the job if it follows one."""
    flags = make_parser().parse_args(argv)
    asked = [flags.stop, flags.status, flags.follow, flags.list, flags.entrypoint]
    if sum(map(bool, asked)) != 1:
        raise ValueError("give one of --stop, --status, --follow, --list, or `-- lgm-dist train ...`; see --help")
    if flags.entrypoint:
        jobs.check_paths(flags.entrypoint)
        environment = jobs.job_environment(flags.env)
    with jobs.plain_errors(flags.address):
        client = jobs.connect(flags.address)
        if flags.list:
            sys.stdout.write(jobs.list_jobs(client))
            return
        if flags.stop:
            jobs.stop(client, flags.stop)
        if name := flags.stop or flags.status:
            sys.stdout.write(f"{jobs.status(client, name)}\n")
            return
        name = flags.follow
        if not name:
            name = jobs.submit(client, flags.name, flags.entrypoint, environment)
            sys.stdout.write(f"job {name} (end it with `lgm-dist submit --stop {name}`)\n")
        if not flags.no_wait:
            sys.exit(jobs.follow(client, name))


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    add = parser.add_argument
    add("--address", default=address, help="URL of the cluster's dashboard (default: %(default)s)")
    add("--name", default="", help="name of the job (default: the --name in its command, else one that Ray makes)")
    add("--env", action="append", default=[], metavar="K[=V]", help="a variable for the job; K alone: its value here")
    add("--no-wait", action="store_true", help="submit the job and do not follow it")
    add("--follow", metavar="JOB", help="show the logs of a job and return its exit status")
    add("--stop", metavar="JOB", help=f"end a job; a training has {jobs.STOP_SECONDS} s for its last checkpoint")
    add("--status", metavar="JOB", help="print the status of a job")
    add("--list", action="store_true", help="print all jobs of the cluster")
    add("entrypoint", nargs="*", metavar="-- COMMAND", help="what the job runs")
    return parser
