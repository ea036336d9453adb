#!/bin/sh
# Makes the virtual machine in VirtualBox:  sh B-ro-Server-alt.virtualbox.sh [NAME]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
command -v VBoxManage >/dev/null || { echo "VBoxManage is missing: install VirtualBox" >&2; exit 1; }
name='Büro-Server (alt)'
[ $# -eq 0 ] || name=$1
for disk in metal1.vdi metal1-data.vdi; do
    [ -f "$here/$disk" ] || { echo "$here/$disk is missing" >&2; exit 1; }
done
VBoxManage createvm --name "$name" --ostype Linux_64 --register
trap 'VBoxManage unregistervm "$name"' EXIT
VBoxManage modifyvm "$name" --memory 16384 --cpus 8 --firmware efi --chipset ich9 --ioapic on --rtcuseutc off --graphicscontroller vmsvga --vram 16 --boot1 disk --boot2 none --boot3 none --boot4 none
VBoxManage modifyvm "$name" --nic1 bridged --nictype1 virtio --bridgeadapter1 eth0 --macaddress1 3CECEF001122
VBoxManage storagectl "$name" --name disks --add sata --controller IntelAhci --portcount 2 --bootable on
VBoxManage storageattach "$name" --storagectl disks --port 0 --device 0 --type hdd --medium "$here"/metal1.vdi
VBoxManage storageattach "$name" --storagectl disks --port 1 --device 0 --type hdd --medium "$here"/metal1-data.vdi
trap - EXIT
echo "The virtual machine $name was made. Start it with: VBoxManage startvm \"$name\""
