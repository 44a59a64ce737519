#!/usr/bin/env bash
# Run the tests on other releases of Python: those of Debian's newer releases, each unpacked into a folder of its own.
#
#     tests/pythons.sh 3.14 [ARGUMENT OF PYTEST ...]     as root; needs the package debootstrap
#
# The first run for a release unpacks it and installs speval there with its extras, which takes about three minutes. FOLDER,
# /var/tmp/speval-pythons unless set, keeps it for the next run. It is not part of .ci/run.
set -euo pipefail

version=${1:?usage: tests/pythons.sh 3.13|3.14 [ARGUMENT OF PYTEST ...]}
shift
case $version in
    3.13) release=trixie ;;
    3.14) release=sid ;;
    *) echo "tests/pythons.sh: no Debian release with Python $version is known here: add one to this script" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
root=${FOLDER:-/var/tmp/speval-pythons}/$release

if [ ! -e "$root/.unpacked" ]; then
    rm -rf --one-file-system "$root"
    mkdir -p "$root"
    # iproute2, mount and procps are what some of the tests use; gcc is for packages without a wheel for this Python.
    debootstrap --variant=minbase \
        --include=python3,python3-venv,python3-dev,gcc,ca-certificates,iproute2,mount,procps,git \
        "$release" "$root" http://deb.debian.org/debian
    touch "$root/.unpacked"
fi
found=$(chroot "$root" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$found" != "$version" ]; then
    echo "tests/pythons.sh: Debian $release has Python $found by now, not $version" >&2
    exit 2
fi

cp /etc/resolv.conf /etc/hosts "$root/etc/" 2>/dev/null || true
settings=()
if [ -n "${PIP_CERT:-}" ]; then # what pip trusts here, it needs there too
    cp "$PIP_CERT" "$root/etc/ssl/certs/pip.crt"
    settings=(PIP_CERT=/etc/ssl/certs/pip.crt)
fi
# The files that git knows of, and those that are new: no environment of this checkout, which is for another Python.
rm -rf "$root/speval"
mkdir -p "$root/speval"
git ls-files -z --cached --others --exclude-standard | xargs -0 tar -c --ignore-failed-read | tar -x -C "$root/speval"

# In a mount namespace of its own, so that what is mounted here ends with it. A root that is no mount point could not be made
# private, which `ip netns` wants to do.
exec unshare --mount bash -s "$root" "${settings[@]}" -- "$@" <<'INSIDE'
set -euo pipefail
root=$1
shift
settings=()
while [ "$1" != -- ]; do settings+=("$1"); shift; done
shift
mount --make-rprivate /
mount --bind "$root" "$root"
for folder in proc sys dev; do mount --rbind "/$folder" "$root/$folder"; done
cd "$root"
clean=(/usr/bin/env -i HOME=/root LANG=C.UTF-8 TERM=xterm PIP_DISABLE_PIP_VERSION_CHECK=1 "${settings[@]}")
clean+=(PATH=/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin)
[ -x venv/bin/python ] || chroot . "${clean[@]}" python3 -m venv /venv
chroot . "${clean[@]}" bash -c "cd /speval && pip install -q -e '.[dev]'"
exec chroot . "${clean[@]}" bash -c 'cd /speval && exec python -m pytest -p no:cacheprovider "$@"' pytest "$@" < /dev/null
INSIDE
