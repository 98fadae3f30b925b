# SPDX-License-Identifier: Apache-2.0
"""SFTP without a server: fsspec's own client of it, while the disk here does what paramiko would ask a server for."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest


class Ftp:
    """What fsspec uses of paramiko's `SFTPClient`."""

    stat, mkdir, rmdir, remove, posix_rename = map(staticmethod, (os.stat, os.mkdir, os.rmdir, os.remove, os.rename))
    get = staticmethod(shutil.copyfile)

    def open(self, path: str, mode: str, bufsize: int = -1):
        return open(path, mode, buffering=bufsize)

    def listdir_iter(self, path: str) -> Iterator[SimpleNamespace]:
        for name in os.listdir(path):
            found = os.stat(f"{path}/{name}")
            kept = {each: getattr(found, each) for each in dir(found) if each.startswith("st_")}
            yield SimpleNamespace(filename=name, **kept)


@pytest.fixture
def sftp(monkeypatch) -> str:
    """What the address of a folder here begins with, where it is to be reached so."""
    paramiko = ModuleType("paramiko")
    for name in ("AutoAddPolicy", "RejectPolicy", "WarningPolicy", "MissingHostKeyPolicy"):
        setattr(paramiko, name, type(name, (), {}))
    monkeypatch.setitem(sys.modules, "paramiko", paramiko)
    from fsspec.implementations.sftp import SFTPFileSystem

    monkeypatch.setattr(SFTPFileSystem, "_connect", lambda self: setattr(self, "ftp", Ftp()))
    return "sftp://here"
