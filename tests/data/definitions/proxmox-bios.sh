#!/bin/sh
# Makes the virtual machine in Proxmox VE. Run on a node, as root:
#   sh metal1.proxmox.sh [VMID] [STORAGE]       (default: the next free id, local-lvm; the bridge is $BRIDGE or vmbr0)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
command -v qm >/dev/null || { echo "qm is missing: this script runs on a node of Proxmox VE" >&2; exit 1; }
id=${1:-$(pvesh get /cluster/nextid)}
storage=${2:-local-lvm}
bridge=vmbr0
[ -z "${BRIDGE:-}" ] || bridge=$BRIDGE
for disk in metal1.qcow2 metal1-data.qcow2; do
    [ -f "$here/$disk" ] || { echo "$here/$disk is missing" >&2; exit 1; }
done
qm create "$id" --name metal1 --description metal1 --ostype l26 --memory 4096 --sockets 1 --cores 4 --cpu host --bios seabios --smbios1 uuid=4c4c4544-0042-3510-8054-b4c04f4d3132 --serial0 socket --net0 "e1000=52:54:00:A1:00:01,bridge=$bridge" --net1 "e1000,bridge=$bridge"
trap 'qm destroy "$id" --purge' EXIT
qm set "$id" --sata0 "$storage:0,import-from=$here"/metal1.qcow2,discard=on,serial=P2VSRC0001
qm set "$id" --sata1 "$storage:0,import-from=$here"/metal1-data.qcow2,discard=on
qm set "$id" --boot order=sata0
trap - EXIT
echo "The virtual machine $id was made. Start it with: qm start $id"
