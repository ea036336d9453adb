#!/bin/sh
# Makes the virtual machine in VirtualBox:  sh metal1.virtualbox.sh [NAME]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
command -v VBoxManage >/dev/null || { echo "VBoxManage is missing: install VirtualBox" >&2; exit 1; }
name=metal1
[ $# -eq 0 ] || name=$1
for disk in metal1.vdi metal1-data.vdi; do
    [ -f "$here/$disk" ] || { echo "$here/$disk is missing" >&2; exit 1; }
done
VBoxManage createvm --name "$name" --ostype Linux_64 --uuid 4c4c4544-0042-3510-8054-b4c04f4d3132 --register
trap 'VBoxManage unregistervm "$name"' EXIT
VBoxManage modifyvm "$name" --memory 4096 --cpus 4 --firmware bios --chipset piix3 --ioapic on --rtcuseutc on --graphicscontroller vmsvga --vram 16 --boot1 disk --boot2 none --boot3 none --boot4 none
VBoxManage modifyvm "$name" --nic1 nat --nictype1 82540EM --macaddress1 525400A10001
VBoxManage modifyvm "$name" --nic2 nat --nictype2 82540EM
VBoxManage storagectl "$name" --name disks --add ide --controller PIIX4 --bootable on
VBoxManage storageattach "$name" --storagectl disks --port 0 --device 0 --type hdd --medium "$here"/metal1.vdi
VBoxManage storageattach "$name" --storagectl disks --port 0 --device 1 --type hdd --medium "$here"/metal1-data.vdi
trap - EXIT
echo "The virtual machine $name was made. Start it with: VBoxManage startvm \"$name\""
