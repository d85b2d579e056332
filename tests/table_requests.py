"""Requests of the commands that make a DKA file, with the defaults of their flags."""

from dataset_format import REQUESTS


def table_request(command, **values):
    return REQUESTS[command][0](**values)


def make_rows(command, **values):
    """Rows and description."""
    return REQUESTS[command][1](table_request(command, **values))
