#!/usr/bin/env bash
# Makes a stand-in for docker.io/library/python:3.11-slim from Debian's own packages, for machines
# that have podman but cannot pull from Docker Hub. Does nothing where the image is already there.
#
#   sudo deploy/base_image.sh
#
# Debian 12's Python 3.11 is put where the official image has its own, /usr/local/bin, so the
# Dockerfile cannot tell the two apart. The host's own certificates come along: where this is
# needed, package downloads often pass a company proxy that signs with its own certificate.
#
# SECATEUR_CACHE: folder that keeps the unpacked Debian from one run to the next.
set -euo pipefail

image=docker.io/library/python:3.11-slim
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
cache=${SECATEUR_CACHE:-/var/cache/secateur}
root=$cache/debian-12

if podman image exists "$image"; then
    echo "base image: $image is already here"
    exit 0
fi

mkdir -p "$cache"
if [ ! -e "$root/.complete" ]; then
    echo "base image: Debian 12 with Python 3.11 into $root (about a minute)"
    rm -rf "$root"
    debootstrap --variant=minbase \
        --include=python3,python3-pip,python3-venv,ca-certificates \
        bookworm "$root" "$mirror" >"$cache/debootstrap.log" 2>&1 || {
        tail -n 20 "$cache/debootstrap.log" >&2
        exit 1
    }
    for name in python3 python; do ln -sf /usr/bin/python3 "$root/usr/local/bin/$name"; done
    ln -sf /usr/bin/pip3 "$root/usr/local/bin/pip"
    rm -f "$root/usr/lib/python3.11/EXTERNALLY-MANAGED" # the official image has no such marker
    if compgen -G '/usr/local/share/ca-certificates/*.crt' >/dev/null; then
        cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/"
        chroot "$root" update-ca-certificates >>"$cache/debootstrap.log" 2>&1
    fi
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    touch "$root/.complete"
fi

echo "base image: importing as $image"
tar -C "$root" --exclude=./.complete -c . | podman import \
    --change 'CMD ["python3"]' \
    --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
    - "$image" >/dev/null
