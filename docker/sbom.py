"""Add the system's packages to a CycloneDX bill of materials that lists Python's, in place.

dpkg-query --show --showformat '${Package} ${Version} ${Architecture}\n' | python sbom.py sbom.json
"""

import json
import platform
import sys
from pathlib import Path
from urllib.parse import quote


def component(line: str, distribution: dict[str, str]) -> dict[str, str]:
    """Describe an installed package, `name version architecture`, by its package URL (purl-spec, type deb)."""
    name, version, architecture = line.split()
    purl = (
        f"pkg:deb/{distribution['ID']}/{quote(name)}@{quote(version)}"
        f"?arch={architecture}&distro={distribution['ID']}-{distribution['VERSION_ID']}"
    )
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    bill = json.loads(path.read_text(encoding="utf-8"))
    system = platform.freedesktop_os_release()
    bill["components"] = [*bill.get("components", []), *(component(line, system) for line in sys.stdin)]
    path.write_text(json.dumps(bill, indent=1, sort_keys=True) + "\n", encoding="utf-8")
