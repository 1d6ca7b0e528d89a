#!/bin/sh
# Fill /opt/memfit, the part of the image that is memfit's: the same bytes for the same inputs.
# install.sh libraries cpu|cuda    in the versions of constraints.txt
# install.sh memfit                with flows, tasks, configs and the bill of materials
set -eu
here=$(dirname "$0")
venv=/opt/memfit/venv
export SOURCE_DATE_EPOCH=315532800 # 1980, the earliest that a wheel can tell
export PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# Write bytecode, as the image may be read-only; by the sources' hashes, as their dates say nothing. Some libraries ship
# sources for other versions of Python, which do not compile.
compile() {
    "$venv/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$@" >/dev/null || true
}

libraries() {
    python3 -m venv "$venv"
    python3 -m venv /tools
    /tools/bin/pip install --quiet --constraint "$here/constraints.txt" hatchling cyclonedx-bom
    set -- "$venv/bin/pip" install --quiet --no-compile --use-pep517 --constraint "$here/constraints.txt"
    if [ -n "$TORCH_INDEX_URL" ]; then
        "$@" --index-url "$TORCH_INDEX_URL" torch
    fi
    python3 "$here/requirements.py" "$here/pyproject.toml" "$target" "$EXTRAS" >/tmp/requirements.txt
    "$@" --requirement /tmp/requirements.txt
    rm /tmp/requirements.txt
}

memfit() {
    source=$(dirname "$here")
    mkdir /tmp/source
    cp -r "$source/src" "$source/pyproject.toml" "$source/README.md" "$source/LICENSE" /tmp/source
    (cd /tmp/source && /tools/bin/python -m hatchling build -t wheel -d dist)
    "$venv/bin/pip" install --quiet --no-compile --no-deps /tmp/source/dist/*.whl
    rm -r /tmp/source
    mkdir /opt/memfit/app
    cp -r "$source/flows" "$source/tasks" "$source/configs" "$source/prefect.yaml" /opt/memfit/app
    mkdir /opt/memfit/app/docker
    cp -r "$source/docker/pools" /opt/memfit/app/docker
    cp "$source/docker/entrypoint.py" /opt/memfit
    /tools/bin/cyclonedx-py environment --output-reproducible --output-file /opt/memfit/sbom.json "$venv/bin/python"
    dpkg-query --show --showformat '${Package} ${Version} ${Architecture}\n' |
        python3 "$source/docker/sbom.py" /opt/memfit/sbom.json
    "$venv/bin/pip" uninstall --quiet --yes pip
}

touch /tmp/begun
case $1 in
libraries)
    target=$2
    libraries
    compile "$venv"
    ;;
memfit)
    memfit
    compile "$venv"/lib/python3.*/site-packages/memfit /opt/memfit/app
    ;;
esac
find /opt/memfit -newer /tmp/begun -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
