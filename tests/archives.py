"Archives that tests read."
import io
import tarfile


def tar(path, members):
    "A .tar of names and bytes; its path."
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
