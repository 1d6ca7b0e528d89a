#!/bin/sh
# Own the volume, and serve it as the user redis.
set -eu
chown redis:redis /data
exec setpriv --reuid=redis --regid=redis --init-groups "$@" --bind 0.0.0.0 --protected-mode no
