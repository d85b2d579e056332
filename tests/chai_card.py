"""Model facts checked by the schema of the Coalition for Health AI, without network."""

from functools import cache
from xml.etree import ElementTree

import xmlschema

from conftest import DATA

NAMESPACE = "{https://mc.chai.org/v0.2/schema.xsd}"


@cache
def schema():
    """The schema; that of signatures, which it imports, comes with the library."""
    return xmlschema.XMLSchema(DATA / "chai_model_card_v0.2.xsd", allow="local")


def read_facts(text):
    """Return the texts of valid facts by the path of their elements, in order."""
    schema().validate(text)
    found = []

    def walk(element, path):
        path = f"{path}/{element.tag.removeprefix(NAMESPACE)}"
        if not len(element):
            found.append((path.removeprefix("/AppliedModelCard/"), element.text))
        for child in element:
            walk(child, path)

    walk(ElementTree.fromstring(text), "")
    return found
