# Makes the virtual machine in Hyper-V. Run as administrator:  .\metal1.ps1 [-Name NAME] [-SwitchName SWITCH]
#requires -Modules Hyper-V
param([string]$Name = 'metal1', [string]$SwitchName = '')
$ErrorActionPreference = 'Stop'

$disks = @(@(
    'metal1.vhdx',
    'metal1-data.vhdx'
) | ForEach-Object { Join-Path $PSScriptRoot $_ })
foreach ($disk in $disks) {
    if (-not (Test-Path -LiteralPath $disk)) { throw "The disk $disk is missing." }
    & fsutil.exe sparse setflag $disk 0 | Out-Null
}

$vm = New-VM -Name $Name -Generation 1 -MemoryStartupBytes 4294967296 -NoVHD
try {
    Set-VMProcessor -VM $vm -Count 4
    Set-VMMemory -VM $vm -DynamicMemoryEnabled $false
    Get-VMNetworkAdapter -VM $vm | Remove-VMNetworkAdapter
    Add-VMHardDiskDrive -VM $vm -ControllerType IDE -ControllerNumber 0 -ControllerLocation 0 -Path $disks[0]
    Add-VMHardDiskDrive -VM $vm -ControllerType IDE -ControllerNumber 0 -ControllerLocation 1 -Path $disks[1]
    Add-VMNetworkAdapter -VM $vm -Name 'net0' -StaticMacAddress '525400A10001'
    Add-VMNetworkAdapter -VM $vm -Name 'net1'
    if ($SwitchName) { Get-VMNetworkAdapter -VM $vm | Connect-VMNetworkAdapter -SwitchName $SwitchName }
    Set-VMComPort -VM $vm -Number 1 -Path '\\.\pipe\metal1'
    Set-VMBios -VM $vm -StartupOrder @('IDE', 'CD', 'LegacyNetworkAdapter', 'Floppy')
} catch {
    Remove-VM -VM $vm -Force
    throw
}
Write-Host "The virtual machine $Name was made. Start it with: Start-VM -Name '$Name'"
