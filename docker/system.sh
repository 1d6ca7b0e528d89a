#!/bin/sh
# Add system packages and the user memfit, and leave nothing behind that differs from one build to the next.
# system.sh PACKAGE[=VERSION]...
set -eu
export SOURCE_DATE_EPOCH=315532800 # 1980, the earliest that a wheel can tell
touch /tmp/begun
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache /var/lib/dpkg/*-old \
    /var/log/apt /var/log/dpkg.log /var/log/alternatives.log

if ! grep -q "^memfit:" /etc/passwd; then
    sed -i '/^[^:]*:[^:]*:1000:/d' /etc/passwd /etc/group # some bases have a user of this number
    echo "memfit:x:1000:" >>/etc/group
    echo "memfit:x:1000:1000:memfit:/data/home:/bin/sh" >>/etc/passwd
    mkdir -p /data
    chown 1000:1000 /data
fi

find / -xdev \( -path /proc -o -path /sys -o -path /dev \) -prune -o -newer /tmp/begun \
    -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} + 2>/dev/null || true
rm /tmp/begun
touch --date="@$SOURCE_DATE_EPOCH" /tmp
