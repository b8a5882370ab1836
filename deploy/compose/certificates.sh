#!/bin/sh
# Makes what is missing of the fleet's certificates, and gives each service its own and nothing else.
#
#   certificates.sh PKI SERVER_HOST SERVER_DIR NODE=DIR...
set -eu
pki=$1 host=$2 server=$3
shift 3

[ -f "$pki/server.pem" ] || turnout certs init "$pki" --host "$host" --host localhost --host 127.0.0.1
install -m 0644 "$pki/ca.pem" "$pki/server.pem" "$server/"
install -m 0600 "$pki/server.key" "$server/"
for pair in "$@"; do
  node=${pair%%=*} folder=${pair#*=}
  [ -f "$pki/$node.pem" ] || turnout certs client "$node" --dir "$pki"
  install -m 0644 "$pki/ca.pem" "$pki/$node.pem" "$folder/"
  install -m 0600 "$pki/$node.key" "$folder/"
done
