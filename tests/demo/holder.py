#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""One of the demo's processes: an ordinary program that holds a real text.

It imports a good part of the standard library, reads the library's own
sources into memory, and then does what it is told on standard input:
`rewrite` (change all that it holds), `verify` (compare a digest of all that it
holds with one made anew from the files), `quit`.

It knows nothing of page merging.
"""

import hashlib
import importlib
import os
import sys
import sysconfig

# Modules that a medium-sized application imports.
MODULES = """
    argparse array ast asyncio base64 bisect bz2 calendar cmd code codecs
    collections concurrent.futures configparser contextlib copy csv ctypes
    dataclasses datetime decimal difflib dis doctest email.message enum
    fileinput fnmatch fractions functools getopt gettext glob graphlib gzip
    heapq hmac html.parser http.client http.cookiejar http.server imaplib
    inspect ipaddress itertools json locale logging.config lzma mailbox
    mimetypes multiprocessing numbers operator optparse pathlib pdb pickle
    pickletools pkgutil platform plistlib poplib pprint profile pstats pydoc
    queue random re reprlib sched secrets selectors shelve shlex shutil
    smtplib socketserver sqlite3 ssl statistics string struct subprocess
    symtable tarfile tempfile textwrap threading timeit tokenize trace
    traceback tracemalloc types typing unicodedata unittest.mock urllib.request
    uuid warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree
    xml.sax xmlrpc.client zipapp zipfile zoneinfo
""".split()

STEP = 1 << 20


def import_library():
    """Import MODULES; a small Python may lack some of them."""
    count = 0
    for name in MODULES:
        try:
            importlib.import_module(name)
            count += 1
        except ImportError:
            pass
    return count


def library_files():
    """The library's sources, in the same order in every process."""
    top = sysconfig.get_paths()["stdlib"]
    for path, dirs, names in os.walk(top):
        dirs[:] = sorted(d for d in dirs if d != "__pycache__")
        for name in sorted(names):
            if name.endswith(".py") and os.path.isfile(os.path.join(path, name)):
                yield os.path.join(path, name)


def pieces(files):
    """The text of all files, a file at a time."""
    for name in files:
        with open(name, "rb") as file:
            yield file.read()


def load(files):
    """All the text in one writable piece of memory."""
    text = bytearray(sum(os.path.getsize(name) for name in files))
    at = 0
    for piece in pieces(files):
        text[at:at + len(piece)] = piece
        at += len(piece)
    assert at == len(text), "a file changed while it was read"
    return text


def table(key):
    """A translation that changes every byte, each process in its own way."""
    return bytes((byte + key) % 256 for byte in range(256))


class Holder:
    def __init__(self, number):
        # Never 0, and different for each process.
        self.key = number + 1
        self.imported = import_library()
        self.files = list(library_files())
        self.text = load(self.files)
        self.rewritten = False

    def expected(self):
        """The digest of the expected text, from the files alone."""
        change = table(self.key) if self.rewritten else None
        digest = hashlib.sha256()
        for piece in pieces(self.files):
            digest.update(piece.translate(change))
        return digest.hexdigest()

    def rewrite(self):
        change = table(self.key)
        for at in range(0, len(self.text), STEP):
            self.text[at:at + STEP] = self.text[at:at + STEP].translate(change)
        self.rewritten = True
        return "rewritten"

    def verify(self):
        have = hashlib.sha256(self.text).hexdigest()
        want = self.expected()
        return f"verified {have}" if have == want else f"mismatch {have} {want}"


def main():
    holder = Holder(int(sys.argv[1]))
    print("ready", len(holder.text), len(holder.files), holder.imported, flush=True)
    for line in sys.stdin:
        match line.strip():
            case "rewrite":
                print(holder.rewrite(), flush=True)
            case "verify":
                print(holder.verify(), flush=True)
            case "quit":
                return
            case other:
                sys.exit(f"holder: {other!r} is no command")


main()
