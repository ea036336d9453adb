#!/bin/sh
# Makes the virtual machine in Proxmox VE. Run on a node, as root:
#   sh B-ro-Server-alt.proxmox.sh [VMID] [STORAGE]       (default: the next free id, local-lvm; the bridge is $BRIDGE or vmbr0)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
command -v qm >/dev/null || { echo "qm is missing: this script runs on a node of Proxmox VE" >&2; exit 1; }
id=${1:-$(pvesh get /cluster/nextid)}
storage=${2:-local-lvm}
bridge=vmbr7
[ -z "${BRIDGE:-}" ] || bridge=$BRIDGE
for disk in metal1.qcow2 metal1-data.qcow2; do
    [ -f "$here/$disk" ] || { echo "$here/$disk is missing" >&2; exit 1; }
done
qm create "$id" --name B-ro-Server-alt --description 'Büro-Server (alt)' --ostype l26 --memory 16384 --sockets 2 --cores 4 --cpu host --bios ovmf --machine q35 --scsihw virtio-scsi-single --localtime 1 --serial0 socket --net0 "virtio=3C:EC:EF:00:11:22,bridge=$bridge"
trap 'qm destroy "$id" --purge' EXIT
qm set "$id" --efidisk0 "$storage:1,efitype=4m,pre-enrolled-keys=0"
qm set "$id" --scsi0 "$storage:0,import-from=$here"/metal1.qcow2,discard=on,serial=P2VSRC0001
qm set "$id" --scsi1 "$storage:0,import-from=$here"/metal1-data.qcow2,discard=on
qm set "$id" --boot order=scsi0
trap - EXIT
echo "The virtual machine $id was made. Start it with: qm start $id"
