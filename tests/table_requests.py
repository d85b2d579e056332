"""Requests of the commands that make a DKA file, with the defaults of their flags."""

from pathlib import Path

from dataset_format import REQUESTS, build_parser


def table_request(command, **values):
    words = [f"--{name}={value}" for name, value in values.items() if isinstance(value, Path)]
    arguments = vars(build_parser().parse_args([command, *words])) | values
    for name in ("command", "list_codes", "preview", "config"):
        arguments.pop(name, None)
    return REQUESTS[command][0](**arguments)


def make_rows(command, **values):
    """Rows and description."""
    return REQUESTS[command][1](table_request(command, **values))
