"""Write what a wheelhouse holds: an SBOM (CycloneDX), the licences, and wheelhouse.json.

The SBOM names every wheel and every package of the distribution with its version, sha256 and
package URL, and every wheel with its licence; what distributions say of licences is texts, which
lie beside it. The base image is named, not looked into; a kit lists its packages, too.
"""

import argparse
import email
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path, PurePosixPath

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

SBOM = "sbom.cdx.json"
_LICENCE = re.compile(r"(licen[cs]e|copying|notice|authors)", re.IGNORECASE)


def read_wheel(wheel: Path) -> tuple[Message, dict[str, bytes]]:
    """The metadata of a wheel, and its licences by name."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [PurePosixPath(i.filename) for i in archive.infolist() if not i.is_dir()]
        info = [name for name in inside if name.parts[0].endswith(".dist-info")]
        metadata = next(name for name in info if name.name == "METADATA")
        licences = {
            "_".join(name.parts[1:]): archive.read(str(name))
            for name in info
            if _LICENCE.search("/".join(name.parts[1:]))
        }
        return email.message_from_bytes(archive.read(str(metadata))), licences


def licence_of(metadata: Message) -> str | None:
    """As the package says it: an SPDX expression, a short text, or a classifier."""
    if expression := metadata.get("License-Expression"):
        return expression
    text = metadata.get("License") or ""
    if text and "\n" not in text.strip() and len(text) < 80:
        return text.strip()
    found = [c for c in metadata.get_all("Classifier", []) if c.startswith("License :: OSI")]
    return found[0].rpartition(" :: ")[2] if found else None


def component(
    purl: PackageURL, *, file: Path | None = None, licence: str | None = None
) -> Component:
    """One package of the SBOM."""
    hashes = []
    if file is not None:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest)]
    return Component(
        type=ComponentType.LIBRARY,
        name=purl.name,
        version=purl.version,
        purl=purl,
        bom_ref=purl.to_string(),
        hashes=hashes,
        licenses=[LicenseFactory().make_from_string(licence)] if licence else [],
    )


def wheels(folder: Path, licences: Path) -> Iterator[Component]:
    """Of every wheel; its licences are written below `licences`."""
    for wheel in sorted(folder.glob("*.whl")):
        metadata, texts = read_wheel(wheel)
        name, version = metadata["Name"], metadata["Version"]
        for file, text in texts.items():
            target = licences / f"{name}-{version}" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
        purl = PackageURL("pypi", None, name.lower().replace("_", "-"), version)
        yield component(purl, file=wheel, licence=licence_of(metadata))


def debs(folder: Path, distribution: str) -> Iterator[Component]:
    """Of every package that `docker/fetch-debs` listed: name, version, architecture, file."""
    listed = folder / "packages.tsv"
    for line in listed.read_text().splitlines() if listed.exists() else ():
        name, version, architecture, file = line.split("\t")
        purl = PackageURL("deb", distribution, name, version, {"arch": architecture})
        yield component(purl, file=folder / file)


def base_image(name: str, archive: Path) -> Component:
    """What the rest is put on."""
    repository, _, tag = name.partition(":")
    return component(PackageURL("docker", None, repository, tag or "latest"), file=archive)


def write_sbom(bom: Bom, file: Path) -> None:
    make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_to_file(
        str(file), allow_overwrite=True, indent=1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheelhouse", type=Path)
    for name in ("flavour", "base", "revision"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    folder, licences = given.wheelhouse, given.wheelhouse / "licences"
    licences.mkdir()
    if (folder / "debs" / "licences").exists():
        shutil.move(folder / "debs" / "licences", licences / "debs")
    own = next((folder / "own").glob("*.whl"))
    version = own.name.split("-")[1]
    bom = Bom()
    bom.metadata.component = Component(
        type=ComponentType.CONTAINER, name="shardline", version=version
    )
    distribution = "ubuntu" if "ubuntu" in given.base else "debian"
    found_wheels = [*wheels(folder / "wheels", licences), *wheels(folder / "own", licences)]
    base = base_image(given.base, folder / "base.tar")
    for found in (base, *found_wheels, *debs(folder / "debs", distribution)):
        bom.components.add(found)
        bom.register_dependency(bom.metadata.component, [found])
    write_sbom(bom, folder / SBOM)
    about = {
        "version": version,
        "revision": given.revision,
        "flavour": given.flavour,
        "base": given.base,
        "python": (folder / "debs" / "python").read_text().strip(),
    }
    (folder / "wheelhouse.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
