# Makes the virtual machine in Hyper-V. Run as administrator:  .\B-ro-Server-alt.ps1 [-Name NAME] [-SwitchName SWITCH]
#requires -Modules Hyper-V
param([string]$Name = 'Büro-Server (alt)', [string]$SwitchName = 'LAN switch')
$ErrorActionPreference = 'Stop'

$disks = @(@(
    'metal1.vhdx',
    'metal1-data.vhdx'
) | ForEach-Object { Join-Path $PSScriptRoot $_ })
foreach ($disk in $disks) {
    if (-not (Test-Path -LiteralPath $disk)) { throw "The disk $disk is missing." }
    & fsutil.exe sparse setflag $disk 0 | Out-Null
}

$vm = New-VM -Name $Name -Generation 2 -MemoryStartupBytes 17179869184 -NoVHD
try {
    Set-VMProcessor -VM $vm -Count 8
    Set-VMMemory -VM $vm -DynamicMemoryEnabled $false
    Get-VMNetworkAdapter -VM $vm | Remove-VMNetworkAdapter
    Add-VMHardDiskDrive -VM $vm -ControllerType SCSI -ControllerNumber 0 -ControllerLocation 0 -Path $disks[0]
    Add-VMHardDiskDrive -VM $vm -ControllerType SCSI -ControllerNumber 0 -ControllerLocation 1 -Path $disks[1]
    Add-VMNetworkAdapter -VM $vm -Name 'net0' -StaticMacAddress '3CECEF001122'
    if ($SwitchName) { Get-VMNetworkAdapter -VM $vm | Connect-VMNetworkAdapter -SwitchName $SwitchName }
    Set-VMComPort -VM $vm -Number 1 -Path '\\.\pipe\B-ro-Server-alt'
    $boot = Get-VMHardDiskDrive -VM $vm | Select-Object -First 1
    Set-VMFirmware -VM $vm -EnableSecureBoot On -SecureBootTemplate MicrosoftUEFICertificateAuthority -FirstBootDevice $boot
} catch {
    Remove-VM -VM $vm -Force
    throw
}
Write-Host "The virtual machine $Name was made. Start it with: Start-VM -Name '$Name'"
