"""setuptools, whose template of an sdist lies in this folder: it would add some of the tests."""

from setuptools.build_meta import *  # noqa: F403
from setuptools.command.egg_info import manifest_maker

manifest_maker.template = ".ci/MANIFEST.in"
