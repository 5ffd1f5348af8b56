#!/usr/bin/env bash
# Installs the binary, the mount(8) helper and the shell completions; with --systemd also units and example settings.
#
#   deploy/install.sh [--systemd] [BINARY]      BINARY: default target/release/fjord of this repository
#
# DESTDIR is put before every path, for packages.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
systemd=no
if [[ ${1:-} == --systemd ]]; then
    systemd=yes
    shift
fi
if [[ ${1:-} == -* ]]; then
    usage >&2
    exit 2
fi
binary=${1:-$here/../target/release/fjord}
root=${DESTDIR:-}

if [[ ! -x $binary ]]; then
    echo "no binary at $binary: build it with cargo build --release, or name it" >&2
    exit 1
fi

install -D -m 755 "$binary" "$root/usr/local/bin/fjord"
# mount -t fuse.fjord and /etc/fstab look for this name.
install -d "$root/sbin"
ln -sfn /usr/local/bin/fjord "$root/sbin/mount.fuse.fjord"

install -d "$root/usr/share/bash-completion/completions" "$root/usr/share/zsh/site-functions" "$root/usr/share/fish/vendor_completions.d"
"$binary" completions bash >"$root/usr/share/bash-completion/completions/fjord"
"$binary" completions zsh >"$root/usr/share/zsh/site-functions/_fjord"
"$binary" completions fish >"$root/usr/share/fish/vendor_completions.d/fjord.fish"

if [[ $systemd == yes ]]; then
    install -D -m 644 -t "$root/etc/systemd/system" "$here"/systemd/fjord-*.service
    for file in meta.toml data.toml; do
        # Settings that are there already are kept.
        [[ -e $root/etc/fjord/$file ]] || install -D -m 644 "$here/config/$file" "$root/etc/fjord/$file"
    done
    echo "edit /etc/fjord/*.toml, then: systemctl daemon-reload && systemctl enable --now fjord-meta (or fjord-data)"
fi
echo "installed $("$binary" --version)"
