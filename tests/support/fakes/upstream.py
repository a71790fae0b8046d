"""A small upstream for tests of scripts/patches.py: an sdist in a folder, a matching pin, two patches, one own file.

The commands run on it as a user runs them, without a network; its fixtures are in upstream_fixtures.py.

    checkout = Checkout(tmp_path); patches.main(["--root", str(tmp_path), "apply"])
"""

import io
import sys
import tarfile

from patches_lib import upstream


def numbered(word, count=30):
    return "".join(f"{word} {n}\n" for n in range(1, count + 1))


UPSTREAM = {
    "CMakeLists.txt": "add_library(x\n  src/a.cpp\n  src/b.cpp)\nfile(GLOB MORE gpu/*.cu)\n",
    "src/a.cpp": numbered("a"),
    "src/b.cpp": numbered("b"),
    "convert.py": "print()\n",
    "models/vocab.gguf": "big",
}
HEADER = b"Subject: make it so\nWhy: because of this\n  and of that\nGoes away when: upstream does it\n\n"
ONE = b"""\
diff --git a/CMakeLists.txt b/CMakeLists.txt
--- a/CMakeLists.txt
+++ b/CMakeLists.txt
@@ -2,2 +2,3 @@ add_library(x
   src/a.cpp
+  src/ours.cpp
   src/b.cpp)
diff --git a/src/a.cpp b/src/a.cpp
--- a/src/a.cpp
+++ b/src/a.cpp
@@ -5,3 +5,3 @@ a 4
 a 5
-a 6
+a six
 a 7
"""
TWO = b"""\
diff --git a/src/a.cpp b/src/a.cpp
--- a/src/a.cpp
+++ b/src/a.cpp
@@ -20,2 +20,3 @@ a 19
 a 20
+a twenty and a half
 a 21
"""
OURS = "// What this is: a file of ours.\nint ours;\n"
N1, N2 = "0001-first.patch", "0002-second.patch"


def make_sdist(folder, version, files, members=()):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"llama_cpp_python-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"llama_cpp_python-{version}/vendor/llama.cpp/{name}")
            data = text.encode()
            info.size, info.mode = len(data), 0o755 if name.endswith(".py") else 0o644
            archive.addfile(info, io.BytesIO(data))
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


class Checkout:
    """A checkout in a folder: two patches on the fake upstream, and one file of ours."""

    def __init__(self, root):
        self.root, self.patches, self.vendor = root, root / "patches", root / "vendor"
        self.tree, self.pristine = self.vendor / "llama.cpp-patched", self.vendor / "llama.cpp"
        self.sdist = make_sdist(self.vendor, "1.0", UPSTREAM)
        self.pin(upstream.sha256_of(self.sdist))
        self.put("patches/series", f"# order matters\n{N1}\n{N2}\n")
        self.put(f"patches/{N1}", HEADER + ONE)
        self.put(f"patches/{N2}", HEADER + TWO)
        self.put("patches/src/src/ours.cpp", OURS)

    def pin(self, sha256):
        text = f"# pin\nname = llama-cpp-python\nversion = 1.0\nsha256 = {sha256}\ntree = vendor/llama.cpp\n"
        self.put("patches/UPSTREAM", text)

    def put(self, path, content):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def swap(self, path, old, new):
        """Edits a file of the checkout; fails if there is nothing to edit."""
        data = (self.root / path).read_bytes()
        assert data.count(old.encode()) == 1
        (self.root / path).write_bytes(data.replace(old.encode(), new.encode()))

    def edit(self, path, old, new):
        self.swap(f"vendor/llama.cpp-patched/{path}", old, new)

    def state(self, folder="patches"):
        """{path: (content, mtime)} of a folder."""
        paths = (path for path in (self.root / folder).rglob("*") if path.is_file())
        return {str(p.relative_to(self.root / folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


def fake_pip(monkeypatch, code):
    monkeypatch.setattr(upstream, "_find_pip", lambda env: [sys.executable, "-c", code])


def edit_patched(c):
    c.edit("src/a.cpp", "a 12\n", "a twelve\n")
    return "src/a.cpp"


def edit_unpatched(c):
    c.edit("src/b.cpp", "b 12\n", "b 21\n")  # of the same length
    return "src/b.cpp"


def edit_ours(c):
    c.edit("src/ours.cpp", "int", "long")
    return "src/ours.cpp"


def add_file(c):
    c.put("vendor/llama.cpp-patched/gpu/more.cu", "// Another file of ours, for the GPU.\n")
    return "gpu/more.cu"


def delete_file(c):
    (c.tree / "src/b.cpp").unlink()
    return "src/b.cpp"


EDITS = [edit_patched, edit_unpatched, edit_ours, add_file, delete_file]


def release(checkout, version, **changes):
    files = dict(UPSTREAM)
    for path, change in changes.items():
        name = {"a": "src/a.cpp", "cmake": "CMakeLists.txt"}[path]
        files[name] = change(files[name])
        assert files[name] != UPSTREAM[name]
    return make_sdist(checkout.vendor, version, files)
